"""Draws the curve of docs/quality.md: quality against tokens per forward."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_BLOCKS = {16: "#1f6feb", 32: "#d29922", 64: "#cf222e"}
HEADLINE_SHARE, HEADLINE_RATE = 0.987, 2.42
"""The share of its AR quality that the released model keeps, and its speed over that of AR there (arXiv 2606.26493)."""


def draw(ar: float, points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw one line per block size over its thresholds, with AR and the published point beside them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "quality", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), facecolor="white")
    axes.axhline(ar, color="#57606a", linewidth=1)
    axes.text(2, ar, f"AR {ar:.1%}", color="#57606a", va="bottom", fontsize=9)
    ours = [p["exact_match"] for p in points if p["block_size"] == 16]
    low = min(ours) - 0.015
    axes.set_ylim(low, max(ar, *ours) + 0.012)
    axes.plot(
        HEADLINE_RATE,
        HEADLINE_SHARE * ar,
        marker="*",
        color="#57606a",
        markersize=12,
        linestyle="none",
        label="98.7% of AR at 2.42 (published)",
    )
    for size, colour in SHOWN_BLOCKS.items():
        line = sorted(
            (p for p in points if p["block_size"] == size and p["steps"] == size), key=lambda p: p["threshold"]
        )
        if line and max(p["exact_match"] for p in line) < low:  # below the picture: only named in the legend
            best = max(p["exact_match"] for p in line)
            axes.plot([], [], marker="o", color=colour, label=f"blocks of {size}: {best:.0%}")
        elif line:
            xs, ys = [p["tokens_per_forward"] for p in line], [p["exact_match"] for p in line]
            axes.plot(xs, ys, marker="o", color=colour, label=f"blocks of {size}")
            for p in line:
                axes.annotate(
                    f"{p['threshold']:g}",
                    (p["tokens_per_forward"], p["exact_match"]),
                    xytext=(-6, 7),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
    few = [p for p in points if p["block_size"] == 16 and p["steps"] < 16]
    for p in few:
        axes.plot(p["tokens_per_forward"], p["exact_match"], marker="x", color="#8250df", linestyle="none")
        axes.annotate(
            f"{p['steps']} step{'s' * (p['steps'] > 1)}",
            (p["tokens_per_forward"], p["exact_match"]),
            xytext=(-10, -14),
            textcoords="offset points",
            fontsize=8,
            color="#8250df",
        )
    axes.set_xlabel("tokens a denoiser forward")
    axes.set_ylabel("exact match")
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=1))
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
