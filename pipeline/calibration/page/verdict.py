"""Describes the choice of a calibration in words: a verdict, and notes on how far it can be trusted."""

from collections.abc import Iterator

from pipeline.calibration.choice import MOST_NOISE, Choice, Result, about_as_fast
from pipeline.calibration.points import AR
from pipeline.calibration.quality import difference, percent, rows_to_tell


def verdict(choice: Choice) -> str:
    """Return a sentence or two that say whether diffusion or AR was chosen, and compare the two in figures."""
    best, reference = choice.best, choice.reference
    if best.point.setting == AR:
        return _verdict_for_ar(choice)
    return (
        f"Diffusion with {best.point.label} at a time is {choice.speedup:.2f} times as fast as AR ({rate(best)} "
        f"tokens/s against {rate(reference)}), and {best.quality.agreement} of its tokens are AR's."
    )


def _verdict_for_ar(choice: Choice) -> str:
    best = choice.best
    others = [result for result in choice.results if result.point.setting != AR]
    if not others:
        return f"Nothing but AR was measured: {rate(best)} tokens/s with {best.point.max_rows} rows at a time."
    quickest = min(others, key=lambda r: r.seconds_per_row)
    times = best.seconds_per_row / quickest.seconds_per_row
    if choice.fastest.point.setting != AR or about_as_fast(best, quickest):
        rival = quickest if choice.fastest.point.setting == AR else choice.fastest
        return (
            f"AR is chosen: it is about as fast for this workload as diffusion ({rate(best)} tokens/s against "
            f"{rate(rival)} with {rival.point.label}), and needs half of the weights."
        )
    if times < 1:
        return (
            f"AR alone is faster for this workload: {rate(best)} tokens/s against {rate(quickest)} of the fastest "
            f"diffusion setting ({quickest.point.label}), {1 / times:.2f} times as fast, with half of the weights."
        )
    nearest = max(others, key=lambda r: (r.quality.agreement.mean, -r.seconds_per_row))
    return (
        f"AR is chosen: diffusion is up to {times:.2f} times as fast here ({quickest.point.label}), but no setting "
        f"that is faster agrees with AR to {percent(choice.min_agreement)} without more repetition. Nearest to AR is "
        f"{nearest.point.setting.label}, with {nearest.quality.agreement} of the tokens, at "
        f"{best.seconds_per_row / nearest.seconds_per_row:.2f} times AR's speed."
    )


def notes(choice: Choice) -> Iterator[str]:
    """Yield notes on the limits of the choice: a sample that is too small, a faster point that was not chosen, a speed
    that is not certain, rows that failed."""
    best, quality = choice.best, choice.best.quality
    rows = len(quality.similarities)
    if best.point.setting != AR and quality.agreement.low < choice.min_agreement:
        more = rows_to_tell(quality.agreement, choice.min_agreement, rows)
        yield (
            f"{rows} rows cannot tell whether the agreement of the chosen point, {quality.agreement}, is above "
            f"{percent(choice.min_agreement)} in the whole job; a sample of about {more:,} rows could."
        )
    if left_out := _fastest_left_out(choice):
        yield _about(left_out, choice)
    if best.point.setting == AR and left_out:
        yield "If such texts are good enough, give a lower --min-agreement: nothing is measured again."
    if (error := best.speed.error) > MOST_NOISE / 2:
        yield (
            f"The speed of the chosen point is known to ± {2 * error:.0%} only: its rows differ much, or something "
            "else ran on the machine."
        )
    if failed := max(quality.errors, choice.reference.quality.errors):
        yield f"{percent(failed)} of the rows failed while they were measured: see `error` in completions/."


def _fastest_left_out(choice: Choice) -> Result | None:
    """Return the fastest of the points that did not qualify and are clearly faster than the chosen one; None if there
    is none. Points whose agreement may be high enough, by its interval, go before all others."""
    best = choice.best
    faster = [
        result
        for result in choice.results
        if result not in choice.good
        and result.seconds_per_row < best.seconds_per_row
        and not about_as_fast(result, best)
    ]
    near = [result for result in faster if result.quality.agreement.high >= choice.min_agreement]
    return min(near or faster, key=lambda r: r.seconds_per_row, default=None)


def _about(left_out: Result, choice: Choice) -> str:
    best, quality = choice.best, left_out.quality
    text = (
        f"A faster point was not chosen: {left_out.point.label}. It is "
        f"{best.seconds_per_row / left_out.seconds_per_row:.2f} times as fast as the chosen point, with agreement "
        f"{quality.agreement} and repetition {percent(quality.repetition)}"
    )
    gap, half = difference(best.quality.similarities, quality.similarities, [1.0] * len(quality.similarities))
    if abs(gap) <= half:
        return f"{text}. The sample is too small to tell the two apart (agreement differs by {gap:.1%} ± {half:.1%})."
    return f"{text}. The agreement of the chosen point minus that of this one is {gap:.1%} ± {half:.1%}."


def rate(result: Result) -> str:
    """Return the completion tokens/s of a result as text without decimals."""
    return f"{result.speed.tokens_per_s:,.0f}"
