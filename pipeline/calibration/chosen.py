"""The user's job file with the chosen settings."""

from collections.abc import Sequence

from pipeline.calibration.bench import RowLimit
from pipeline.calibration.points import Point
from pipeline.job import Job
from pipeline.jobfile import load_job, read_settings
from pipeline.jobtext import to_yaml


def chosen_job(file: str, overrides: Sequence[str], best: Point, max_rows: RowLimit, comments: Sequence[str]) -> bytes:
    """The job file with its overrides and the best point in place; keys keep their order, comments are lost.

    Variables stay variables, so no secret is written that the file itself does not hold. max_rows: the point's, as the
    job is to say it. Raises JobError where the result is no job.
    """
    sets = [*overrides, f"generation.mode={best.setting.mode}", f"engine.max_rows={max_rows}"]
    if best.setting.threshold is not None:
        sets += [
            f"generation.confidence_threshold={best.setting.threshold!r}",
            f"generation.steps_per_block={best.setting.steps}",
        ]
    job = load_job(file, sets)
    settings = read_settings(file, sets)
    if settings.get("name") is None:  # it was the name of the file
        settings = {"name": job.name, **{key: value for key, value in settings.items() if key != "name"}}
    return to_yaml(settings, comments)


def row_limit_to_say(job: Job, best: Point, auto_rows: int | None) -> RowLimit:
    """The row limit in the job's own manner: `auto` where it says so and the best point has as many rows."""
    return "auto" if job.engine.max_rows == "auto" and best.max_rows == auto_rows else best.max_rows
