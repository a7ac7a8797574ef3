"""Plots of the checks: errors of the outputs against their tolerance, and times against the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loracc.reports.report_canvas import ACCENT, BAD, GOOD, INK, MUTED, SECOND, drawn, log_scale
from loracc.reports.report_places import shortened

__all__ = ["interval_plot", "output_plot", "time_plot"]

#: Outputs shown; the table has them all.
_SHOWN = 8


def output_plot(outputs: Sequence[dict[str, Any]]) -> str:
    """Per output: the folded model's error, what its type costs anyway, what is allowed, and what the adapter does."""
    rows = sorted(outputs, key=lambda row: -((row["folded"] or 0.0) / (row["tolerance"] or 1.0)))[:_SHOWN]

    def paint(axes: Any) -> None:
        marks = (
            ("unfused", "unfused, same type", MUTED, "o", 26),
            ("folded", "this output", ACCENT, "D", 30),
            ("tolerance", "allowed", BAD, "|", 120),
            ("effect", "the adapter's effect", GOOD, ">", 30),
        )
        for key, label, colour, marker, size in marks:
            found = [(row[key], at) for at, row in enumerate(rows) if row.get(key)]
            if found:
                axes.scatter(*zip(*found, strict=True), color=colour, marker=marker, s=size, label=label, zorder=3)
        shown = [row[key] for key, *_ in marks for row in rows if row.get(key)]
        if shown:
            log_scale(axes.xaxis, min(shown) / 1.5, max(shown) * 1.5, "{:g}".format)
        axes.set(xlabel="max |error| / max |reference|", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [shortened(row["name"], 22) for row in rows])
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)

    return drawn("outputs", paint, height=1.25 + 0.32 * len(rows))


def time_plot(latency: dict[str, Any]) -> str:
    """Distributions of the base's and the output's times, all processes together."""
    pairs = [pair for process in latency["samples"] for pair in process]

    def paint(axes: Any) -> None:
        values = [sorted(pair[side] for pair in pairs) for side in (0, 1)]
        everything = sorted(values[0] + values[1])
        low, high = everything[len(everything) // 200], everything[-1 - len(everything) // 40]
        step = (high - low) / 30 or low / 100 or 1.0
        edges = [low + step * index for index in range(31)]
        for side, label, colour in ((0, "base", MUTED), (1, "this output", ACCENT)):
            axes.hist(values[side], bins=edges, histtype="step", linewidth=1.5, color=colour, label=label)
            middle = values[side][len(values[side]) // 2]
            axes.axvline(middle, color=colour, linestyle=":", linewidth=1.0)
        axes.set(xlabel="milliseconds a call (dotted: medians)", ylabel="calls")
        axes.legend(loc="upper right")

    return drawn("times", paint)


def interval_plot(latency: dict[str, Any]) -> str:
    """Ratio and 95 % interval of output/base and base/base, and the margin that decides."""
    margin = latency["margin"]
    rows = [
        ("output / base", latency["ratio"], latency["interval"], ACCENT),
        ("base / base", latency["noise_ratio"], latency["noise_interval"], SECOND),
    ]

    def paint(axes: Any) -> None:
        axes.axvspan(1 - margin, 1 + margin, color=GOOD, alpha=0.14, linewidth=0)
        axes.axvline(1.0, color=MUTED, linewidth=0.9)
        for at, (_, ratio, interval, colour) in enumerate(rows):
            if ratio is None or interval is None:
                continue
            axes.plot(interval, [at, at], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt")
            axes.plot([ratio], [at], marker="o", color=colour, markersize=6)
            axes.annotate(f"{ratio:.4f}", (ratio, at), (0, 8), textcoords="offset points", ha="center", color=INK)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.7), xlabel=f"ratio (shaded: ±{100 * margin:g} %, which counts as equal)")
        axes.grid(False)

    return drawn("interval", paint)
