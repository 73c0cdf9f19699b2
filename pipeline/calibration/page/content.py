"""Builds the content of a calibration's report.html."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.calibration.choice import Result, cost_of
from pipeline.calibration.page import charts, template, texts
from pipeline.calibration.page.verdict import notes, rate, verdict
from pipeline.calibration.points import AR, Setting
from pipeline.calibration.quality import percent
from pipeline.calibration.run import Outcome
from pipeline.output.records import now
from pipeline.pages import page
from pipeline.pages.chart import Key
from pipeline.pages.page import shown
from pipeline.storage.urls import safe_url

_METHOD = (
    "Agreement is 1 less the edit distance (Levenshtein, in tokens) between a completion and AR's completion of the "
    "same row, over the length of the longer one; both at temperature 0. Exact is the share of texts that are AR's to "
    "the letter. In brackets: Wilson's 95% interval of the mean over the sample. "
    "Whether a text that differs is worse, neither can say: read some of them.",
    "What a row says does not depend on how many rows run beside it (in float32 on a CPU exactly, in bfloat16 but for "
    "near ties), so agreement, repetition and tokens a forward were measured once for each setting, over the whole "
    "sample, at the largest row limit; speed at each row limit.",
    "Tokens/s are completion tokens of one replica whose slots are all taken: the sample is given again and again, and "
    "counting begins when as many rows have ended as there are slots, and goes on until each slot was refilled twice, "
    "eight rows at least. Rows that run out at the end of a job do not count, nor does the loading of the model; "
    "reading prompts into the context does. ± is twice the standard error, from eight equal pieces of the time.",
    "Repetition is the mean share of a completion that is a loop (the column `repetition`).",
)


def make_report(outcome: Outcome) -> bytes:
    """Return report.html as bytes."""
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
    """Return remarks on the calibration as a whole, for example on points that were not measured."""
    said = []
    if outcome.missing:
        total = len(outcome.choice.results) + len(outcome.missing)
        why = dict.fromkeys(why for _, why in outcome.missing)
        said.append(f"{len(outcome.missing)} of {total} points were not measured: {'; '.join(why)}.")
    if (workload := outcome.setup.workload).extra_tokens:
        job, here = outcome.setup.job.generation.max_new_tokens, outcome.setup.measured.generation.max_new_tokens
        said.append(
            f"Rows were cut at {here:,} tokens (--max-new-tokens), the job allows {job:,}: the whole job takes at "
            f"least what is said here, and up to {cost_of(outcome.choice.best, workload).most:.1f} times as much."
        )
    if outcome.setup.job.generation.on_degenerate == "retry":
        said.append("The job generates rows that loop once more (on_degenerate: retry); that work is not in its hours.")
    if outcome.setup.job.generation.mode == "mock_ar":
        said.append("The job's mode is mock_ar, which is for tests: it was not measured.")
    return said


def amount(value: float | None) -> str:
    """Return a number of hours or an amount of money as text with three significant digits, without decimals from 100
    on. The text is `-` if the value is None or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compared(outcome: Outcome) -> Setting | None:
    """Return the diffusion setting whose texts are shown, or None if no diffusion setting was measured.

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
    replicas = f"{workload.replicas} replicas" if (workload.replicas or 1) > 1 else "1 replica"
    tiles = [
        _chosen_tile(choice.best),
        _speedup_tile(outcome),
        ("tokens/s of a replica", rate(choice.best)),
        (f"hours for {workload.rows:,} rows, {replicas}", amount(cost.hours)),
        ("GPU-hours", amount(cost.gpu_hours)) if workload.gpus else ("replica-hours", amount(cost.replica_hours)),
    ]
    if cost.money is not None:
        tiles.append((f"{workload.currency} at {amount(workload.price)} an hour", amount(cost.money)))
    own = next((result for result in choice.results if result.point == outcome.own), None)
    if own is not None and own is not choice.best:
        tiles.append(
            ("times the speed of the job as it is", f"{own.seconds_per_row / choice.best.seconds_per_row:.2f}")
        )
    return tiles


def _chosen_tile(best: Result) -> tuple[str, str]:
    setting, rows = best.point.setting, f"{best.point.max_rows:,} rows at a time"
    if setting == AR:
        return f"chosen; {rows}", "AR"
    return f"chosen; {setting.steps} steps, {rows}", f"threshold {setting.threshold:g}"


def _speedup_tile(outcome: Outcome) -> tuple[str, str]:
    choice = outcome.choice
    others = [result.seconds_per_row for result in choice.results if result.point.setting != AR]
    if choice.best.point.setting != AR or not others:
        return "times AR's speed", f"{choice.speedup:.2f}"
    return "times the speed of the fastest diffusion", f"{min(others) / choice.best.seconds_per_row:.2f}"


def _small_charts(outcome: Outcome) -> list[tuple[str, list[Key], str]]:
    choice = outcome.choice
    if all(result.point.setting == AR for result in choice.results):
        return []
    forwards = charts.by_threshold(choice, "tokens a denoiser forward", lambda quality: quality.tokens_per_forward)
    loops = charts.by_threshold(choice, "repetition", lambda quality: quality.repetition)
    return [
        (*forwards, "Tokens committed by a denoiser forward, by threshold and steps a block at most."),
        (*loops, "Mean share of a completion that is a loop. Points far above AR's line are not chosen."),
    ]


def _heads(outcome: Outcome) -> list[str]:
    workload = outcome.setup.workload
    heads = ["setting", "rows", "tokens/s", "x AR", "agreement", "exact"]
    heads += ["hours", "GPU-hours" if workload.gpus else "replica-hours"]
    heads += [workload.currency] if workload.price is not None else []
    return [*heads, "tokens a forward", "steps a block", "repe\u00adtition", "tokens a row", "ended by stop"]


def _cells(result: Result, outcome: Outcome) -> list[tuple[str, str]]:
    """Return a pair for each column of `_heads`: the value, and a small text to show beside it."""
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
    wall = f"with {workload.replicas} replicas" if workload.replicas else "with one replica; n of them take 1/n"
    what = "GPU-hours are those of all replicas" if workload.gpus else "There are no GPUs: cost is by replica-hours"
    return f"Hours: {workload.rows:,} rows, every row the mean tokens of the sample, {wall}. {what}."


def _about_texts(other: Setting | None, count: int) -> str:
    if other is None:
        return "No diffusion setting was measured."
    if not count:
        return f"All texts of the sample are the same in AR and with {other.label}."
    return (
        f"{count} rows of the sample in AR and with {other.label}, from the one that differs most to the one that "
        "differs least. Marked is where they differ. All texts are in completions/."
    )


def _about_sample(outcome: Outcome) -> list[str]:
    sample, plan = outcome.setup.sample, outcome.setup.plan
    lines = [
        f"{len(sample.rows):,} rows of {plan.rows:,}. {sample.read:,} rows were read"
        + (" (all there are)" if sample.read >= plan.rows else f" in {sample.places} places at random")
        + ", ordered by prompt length and cut into strata of equal size; from each the same number was drawn."
    ]
    if sample.bad:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in sample.reasons)
        lines.append(f"{sample.bad:,} rows that were read cannot be generated and were left out: {reasons}.")
    if sample.shifted:
        lines.append(
            f"In {sample.shifted} places the row groups are so large that rows nearer to their beginning were taken."
        )
    return [shown(line, 1000) for line in lines]


def _own_method(outcome: Outcome) -> list[str]:
    temperature = outcome.setup.job.generation.temperature
    if outcome.answers[AR].rows is outcome.answers[AR].greedy:
        return []
    return [
        f"The job samples (temperature {temperature:g}), and two samples differ whatever wrote them. So agreement was "
        "measured at temperature 0, in a run of its own; speed, tokens a forward, repetition and lengths as the job "
        "samples."
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
