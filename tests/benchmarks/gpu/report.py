"""Formats the measurements as Markdown for RESULTS.md and as a picture."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

COLOURS = ("#57606a", "#1f6feb", "#d29922", "#8250df", "#cf222e")
GIB = 2**30


def markdown(found: Mapping[str, Any]) -> str:
    """Return tables of the content of gpu.json, below the command, the GPU, the versions and the date."""
    machine = found["machine"]
    lines = [f"`{found['command']}`, {', '.join(f'{name} {value}' for name, value in machine.items())}", ""]
    if ceilings := found.get("ceilings"):
        lines += [
            f"Ceilings measured beside them: {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s copied, "
            f"{ceilings['bf16_flops'] / 1e12:.0f} TFLOP/s in bfloat16.",
            "",
        ]
    if forwards := found.get("forwards"):
        rows: list[tuple[object, ...]] = [
            (
                t["kind"],
                f"{t['context']:,}",
                t["rows"],
                f"{t['ms']:.2f}",
                f"{t['floor_ms']:.2f}",
                f"{t['over_floor']:.2f}",
            )
            for t in forwards
        ]
        lines += _table(("forward", "context", "rows", "ms", "floor ms", "over floor"), rows)
    if rates := found.get("throughput"):
        lines += _table(
            ("mode", "rows", "tokens/s", "device idle", "host ms a turn", "planned GiB", "peak GiB"),
            [
                (
                    *(r["what"], r["rows"], f"{r['tokens_per_s']:,.0f}", _cell(r["host_share"], "{:.1%}")),
                    *(_cell(r["host_ms"], "{:.2f}"), _gib(r["planned"]), _gib(r["peak"])),
                )
                for r in rates
            ],
        )
        lines += [*(f"{name}: {where}" for name, where in crossings(rates).items()), ""]
    if load := found.get("load"):
        rows = [(what, f"{load['disk'][what]:.2f}", f"{load['cache'][what]:.2f}") for what in load["disk"]]
        lines += _table(("weights to the device", "GB/s off the disk", "GB/s from the page cache"), rows)
    if stages := found.get("stages"):
        rows = [
            (what, f"{one['tokens_per_s']:,.0f}", f"{one['rows_that_differ']} of {one['of']}")
            for what, one in stages.items()
            if isinstance(one, Mapping)
        ]
        lines += _table(("on one device", "tokens/s", "rows with other tokens"), rows)
    return "\n".join([*lines, *(f"Left out: {text}" for text in found.get("left_out", ()))]).rstrip() + "\n"


def crossings(rates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return, for each setting of diffusion, between which numbers of rows it becomes slower or faster than AR."""
    curves = _curves(rates)
    base = curves.pop("ar", {})
    found = {}
    for name, curve in curves.items():
        rows = sorted(base.keys() & curve.keys())
        ahead = {n: curve[n] > base[n] for n in rows}
        turns = [f"between {a} and {b} rows" for a, b in pairwise(rows) if ahead[a] != ahead[b]]
        if rows:
            always = f"{'faster' if ahead[rows[0]] else 'slower'} than AR at all rows measured"
            found[name] = "crosses AR " + " and ".join(turns) if turns else always
    return found


def draw(rates: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw tokens per second over rows, one line per mode, and mark the points at which diffusion crosses AR."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "gpu", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), facecolor="white")
    curves = _curves(rates)
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        rows = sorted(curve)
        axes.plot(rows, [curve[n] for n in rows], marker="o", color=colour, label=name)
    for name, curve in curves.items():
        for x, y in _meetings(curves.get("ar", {}), curve) if name != "ar" else ():
            axes.plot(x, y, marker="x", color="black", markersize=10, linestyle="none")
            axes.annotate(f"{x:.0f} rows", (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
    axes.set_xlabel("rows")
    axes.set_ylabel("tokens/s")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _meetings(a: Mapping[int, float], b: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return the points at which two curves meet, with straight lines between their common points."""
    rows, met = sorted(a.keys() & b.keys()), []
    for low, high in pairwise(rows):
        before, behind = b[low] - a[low], b[high] - a[high]
        if before * behind < 0:
            share = before / (before - behind)
            met.append((low + share * (high - low), a[low] + share * (a[high] - a[low])))
    return met


def _curves(rates: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return mode -> rows -> tokens per second, without lockstep."""
    curves: dict[str, dict[int, float]] = {}
    for r in rates:
        if not r["what"].startswith("lockstep"):
            curves.setdefault(r["what"], {})[r["rows"]] = r["tokens_per_s"]
    return curves


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _gib(count: int | None) -> str:
    return _cell(None if count is None else count / GIB, "{:.1f}")
