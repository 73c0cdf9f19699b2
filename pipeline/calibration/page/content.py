"""Builds report.html of a calibration: computes all values and texts that its template shows."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.calibration.choice import Result, cost_of
from pipeline.calibration.page import charts, template, texts
from pipeline.calibration.page.verdict import notes, rate, verdict
from pipeline.calibration.points import AR, Setting
from pipeline.calibration.quality import percent
from pipeline.calibration.run import Outcome
from pipeline.core.text import counted
from pipeline.output.records import now
from pipeline.pages import page
from pipeline.pages.chart import Key
from pipeline.pages.page import shown
from pipeline.storage.urls import safe_url

_METHOD = (
    "Agreement is 1 minus the edit distance (Levenshtein, in tokens) between a completion and AR's completion of the "
    "same row, divided by the length of the longer one; both are made at temperature 0. Exact is the share of texts "
    "that are the same as AR's. The smaller figures beside the agreement are Wilson's 95% interval of its mean over "
    "the sample. Neither figure says whether a text that differs is worse: read some of them.",
    "The text of a row does not depend on the number of rows that run beside it (in float32 on a CPU exactly, in "
    "bfloat16 except for near ties). So agreement, repetition and tokens per forward were measured once per setting, "
    "over the whole sample, at the largest row limit. Speed was measured at each row limit.",
    "Tokens/s are completion tokens of one replica whose slots are all taken. The sample is submitted again and again. "
    "Counting begins when as many rows have ended as there are slots, and continues at least until twice as many rows "
    "as slots, and eight, have ended. Reading prompts into the context counts; the loading of the model does not, nor "
    "do empty slots at the end of a job. ± is twice the standard error, computed from eight equal pieces of the time.",
    "Repetition is the mean share of a completion that is a loop (the column `repetition`).",
)
"""Paragraphs that explain how the figures of every calibration were measured."""


def make_report(outcome: Outcome) -> bytes:
    """Return report.html of a calibration as UTF-8 HTML."""
    choice, setup = outcome.choice, outcome.setup
    other = _compared(outcome)
    rows, sample = setup.sample.rows, setup.sample
    pairs = texts.pairs(rows, outcome.answers[AR].greedy, outcome.answers[other].greedy) if other else []
    context: dict[str, Any] = {
        "heading": f"Calibration of {shown(setup.job.name or 'job', 200)}",
        "verdict": verdict(choice),
        "tiles": _tiles(outcome),
        "notes": [*notes(choice), *remarks(outcome)],
        "quality": charts.quality_speed(choice),
        "small_charts": _small_charts(outcome),
        "heads": _heads(outcome),
        "points": [(result is choice.best, _cells(result, outcome)) for result in _ordered(choice.results)],
        "under_points": _under_points(outcome),
        "missing": [(point.label, why) for point, why in outcome.missing],
        "texts": pairs,
        "texts_about": _about_texts(other, len(pairs)),
        "other": other.label if other else "",
        "sample": _about_sample(outcome),
        "strata": [
            (f"{stratum.shortest:,} to {stratum.longest:,}", percent(stratum.share), stratum.rows)
            for stratum in sample.strata
        ],
        "method": [*_METHOD, *_own_method(outcome)],
        "settings": [*_settings(outcome).items(), ("written", now())],
    }
    return page.render(template.BODY, context, title=context["heading"], style=template.STYLE)


def remarks(outcome: Outcome) -> list[str]:
    """Return a sentence for each thing that the calibration did not measure.

    These are missing points; the tokens of a row beyond the limit at which the calibration cut it (--max-new-tokens);
    rows that the job generates again because they loop; and the job's mode, if that is `mock_ar`, which is for tests.
    """
    said = []
    if outcome.missing:
        total = len(outcome.choice.results) + len(outcome.missing)
        why = dict.fromkeys(why for _, why in outcome.missing)
        said.append(f"Not measured: {len(outcome.missing)} of {total} points, for these reasons: {'; '.join(why)}.")
    if (workload := outcome.setup.workload).extra_tokens:
        job, here = outcome.setup.job.generation.max_new_tokens, outcome.setup.measured.generation.max_new_tokens
        said.append(
            f"Rows were cut at {here:,} tokens (--max-new-tokens), the job allows {job:,}: the whole job takes at "
            f"least the time given here, and up to {cost_of(outcome.choice.best, workload).most:.1f} times as much."
        )
    if outcome.setup.job.generation.on_degenerate == "retry":
        said.append("The job generates a row again if it loops (on_degenerate: retry); that work is not in its hours.")
    if outcome.setup.job.generation.mode == "mock_ar":
        said.append("The job's mode is mock_ar, which is for tests: it was not measured.")
    return said


def amount(value: float | None) -> str:
    """Return hours or money as text with three significant digits, or as a whole number from 100 on.

    The text is `-` if the value is None or not finite.
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compared(outcome: Outcome) -> Setting | None:
    """Return the diffusion setting whose texts are shown beside AR's, or None if no diffusion setting was measured.

    It is the chosen setting if that is diffusion, else the job's own if it was measured, else the one that agrees best
    with AR.
    """
    candidates = [result for result in outcome.choice.results if result.point.setting != AR]
    if outcome.choice.best.point.setting != AR:
        return outcome.choice.best.point.setting
    if any(result.point.setting == outcome.own.setting for result in candidates):
        return outcome.own.setting
    nearest = max(candidates, key=lambda result: result.quality.agreement.mean, default=None)
    return nearest.point.setting if nearest else None


def _tiles(outcome: Outcome) -> list[tuple[str, str]]:
    choice, workload = outcome.choice, outcome.setup.workload
    cost = cost_of(choice.best, workload)
    tiles = [
        _chosen_tile(choice.best),
        _speedup_tile(outcome),
        ("tokens/s of a replica", rate(choice.best)),
        (
            f"hours for {counted(workload.rows, 'row')} on {counted(workload.replicas or 1, 'replica')}",
            amount(cost.hours),
        ),
        ("GPU-hours", amount(cost.gpu_hours)) if workload.gpus else ("replica-hours", amount(cost.replica_hours)),
    ]
    if cost.money is not None:
        tiles.append((f"{workload.currency} at {amount(workload.price)} per hour", amount(cost.money)))
    own = next((result for result in choice.results if result.point == outcome.own), None)
    if own is not None and own is not choice.best:
        tiles.append(
            ("times as fast as with the job's settings", f"{own.seconds_per_row / choice.best.seconds_per_row:.2f}")
        )
    return tiles


def _chosen_tile(best: Result) -> tuple[str, str]:
    setting, rows = best.point.setting, f"{counted(best.point.max_rows, 'row')} at a time"
    if setting == AR:
        return f"chosen; {rows}", "AR"
    return f"chosen; {counted(setting.steps or 0, 'step')}, {rows}", f"threshold {setting.threshold:g}"


def _speedup_tile(outcome: Outcome) -> tuple[str, str]:
    choice = outcome.choice
    others = [result.seconds_per_row for result in choice.results if result.point.setting != AR]
    if choice.best.point.setting != AR or not others:
        return "times as fast as AR", f"{choice.speedup:.2f}"
    return "times as fast as the fastest diffusion", f"{min(others) / choice.best.seconds_per_row:.2f}"


def _small_charts(outcome: Outcome) -> list[tuple[str, list[Key], str]]:
    choice = outcome.choice
    if all(result.point.setting == AR for result in choice.results):
        return []
    forwards = charts.by_threshold(choice, "tokens per denoiser forward", lambda quality: quality.tokens_per_forward)
    loops = charts.by_threshold(choice, "repetition", lambda quality: quality.repetition)
    return [
        (*forwards, "Tokens that a denoiser forward commits, by threshold and limit of steps per block."),
        (*loops, "Mean share of a completion that is a loop. Points far above AR's line are not chosen."),
    ]


def _heads(outcome: Outcome) -> list[str]:
    workload = outcome.setup.workload
    heads = ["setting", "rows", "tokens/s", "x AR", "agreement", "exact"]
    heads += ["hours", "GPU-hours" if workload.gpus else "replica-hours"]
    heads += [workload.currency] if workload.price is not None else []
    return [*heads, "tokens per forward", "steps per block", "repe\u00adtition", "tokens per row", "ended by stop"]


def _cells(result: Result, outcome: Outcome) -> list[tuple[str, str]]:
    """Return (value, small text beside it) of a result for each column of `_heads`."""
    quality, workload = result.quality, outcome.setup.workload
    cost, agreement = cost_of(result, workload), result.quality.agreement
    between = f"{percent(agreement.low)} to {percent(agreement.high)}" if agreement.low < agreement.high else ""
    cells = [
        (result.point.setting.label, "the job's" if result.point == outcome.own else ""),
        (f"{result.point.max_rows:,}", ""),
        (rate(result), f"± {2 * result.speed.error:.0%}"),
        (f"{outcome.choice.reference.seconds_per_row / result.seconds_per_row:.2f}", ""),
        (percent(agreement.mean), between),
        (percent(quality.exact.mean), ""),
        (amount(cost.hours), ""),
        (amount(cost.gpu_hours if workload.gpus else cost.replica_hours), ""),
    ]
    cells += [(amount(cost.money), "")] if workload.price is not None else []
    return [
        *cells,
        ("-" if quality.tokens_per_forward is None else f"{quality.tokens_per_forward:.2f}", ""),
        ("-" if quality.steps_per_block is None else f"{quality.steps_per_block:.1f}", ""),
        (f"{quality.repetition:.3f}", ""),
        (f"{quality.tokens_per_row:,.0f}", ""),
        (percent(quality.stopped), ""),
    ]


def _ordered(results: tuple[Result, ...]) -> list[Result]:
    return sorted(results, key=lambda r: (-r.point.max_rows, not r.point.care[0], *(-x for x in r.point.care[1:3])))


def _under_points(outcome: Outcome) -> str:
    workload = outcome.setup.workload
    wall = f"on {counted(workload.replicas, 'replica')}" if workload.replicas else "on one replica; n replicas take 1/n"
    what = "GPU-hours are those of all replicas" if workload.gpus else "Without GPUs, the price is per replica-hour"
    return f"Hours are for {counted(workload.rows, 'row')} with the mean tokens per row of the sample, {wall}. {what}."


def _about_texts(other: Setting | None, count: int) -> str:
    if other is None:
        return "No diffusion setting was measured."
    if not count:
        return f"All texts of the sample are the same in AR and with {other.label}."
    return (
        f"{counted(count, 'row')} of the sample in AR and with {other.label}, from the least similar texts to the most "
        "similar ones. The part in which two texts differ is marked. All texts are in completions/."
    )


def _about_sample(outcome: Outcome) -> list[str]:
    sample, plan = outcome.setup.sample, outcome.setup.plan
    lines = [
        f"{len(sample.rows):,} of the job's {counted(plan.rows, 'row')}. To draw them, {sample.read:,} were read"
        + (" (all there are)" if sample.read >= plan.rows else f" in {sample.places} places at random")
        + ", ordered by prompt length and cut into strata of equal size; the same number was drawn from each stratum."
    ]
    if sample.bad:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in sample.reasons)
        lines.append(f"Left out: {counted(sample.bad, 'row')} that cannot be generated: {reasons}.")
    if sample.shifted:
        lines.append(
            f"In {sample.shifted} of the places, the row group is so large that rows nearer to its beginning were read."
        )
    return [shown(line, 1000) for line in lines]


def _own_method(outcome: Outcome) -> list[str]:
    temperature = outcome.setup.job.generation.temperature
    if outcome.answers[AR].rows is outcome.answers[AR].greedy:
        return []
    return [
        f"The job samples (temperature {temperature:g}), and two samples of a row differ in any mode. So agreement was "
        "measured at temperature 0, in a run of its own. Speed, tokens per forward, repetition and lengths were "
        "measured at the temperature of the job."
    ]


def _settings(outcome: Outcome) -> Mapping[str, Any]:
    setup, replica = outcome.setup, outcome.replica
    measured = setup.measured
    generation = measured.generation.model_dump(exclude={"mode", "confidence_threshold", "steps_per_block"})
    engine = measured.engine.model_dump(exclude={"max_rows"})
    settings = {
        "input": safe_url(measured.input.path),
        "checkpoint": f"{safe_url(measured.model.checkpoint)} ({str(setup.identity['checkpoint'])[:12]})",
        "dtype": measured.model.dtype,
        **{f"generation.{key}": value for key, value in generation.items()},
        **{f"engine.{key}": value for key, value in engine.items()},
        "device of the replica": replica.device,
        **dict(replica.versions),
    }
    return {key: shown(str(value), 500) for key, value in settings.items()}
