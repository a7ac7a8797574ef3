"""Plots of the deltas: where they are strong, how many directions they take, and what the rounding left of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from loracc.reports.report_canvas import ACCENT, BAD, INK, LINE, MUTED, SECOND, drawn, log_scale
from loracc.reports.report_places import Grid, shortened

__all__ = ["heat_map", "rank_plot", "rounding_plot", "spectrum_plot", "survival_plot"]


def heat_map(grid: Grid) -> str:
    """‖ΔW‖/‖W‖ of every projection in every layer; darker is stronger."""
    rows, columns = len(grid.layers), len(grid.projections)
    strongest = max(grid.values.values(), default=0.0) or 1.0
    labels = [shortened(name, 24) for name in grid.projections]
    longest = max(map(len, labels), default=0)
    turned = columns * max(longest, 6) > 58
    width = max(4.4, 1.1 + 0.42 * columns)
    height = 0.45 + 0.21 * rows + (0.062 * longest if turned else 0.1)

    def paint(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for (layer, projection), value in grid.values.items():
            at = grid.projections.index(projection), grid.layers.index(layer)
            shade = 0.06 + 0.66 * value / strongest
            axes.add_patch(Rectangle(at, 0.97, 0.94, facecolor=ACCENT, alpha=shade, linewidth=0))
            text = f"{value:.3f}" if value >= 0.0095 else f"{value:.0e}"
            axes.text(at[0] + 0.485, at[1] + 0.5, text, ha="center", va="center", fontsize=7, color=INK)
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xticks([0.5 + i for i in range(columns)], labels)
        axes.set_yticks([0.5 + i for i in range(rows)], grid.layer_labels())
        axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
        if turned:
            for label in axes.get_xticklabels():
                label.set(rotation=35, ha="left", rotation_mode="anchor")
        axes.grid(False)
        axes.spines[:].set_visible(False)

    return drawn("heat", paint, width=width, height=height)


def spectrum_plot(deltas: Sequence[dict[str, Any]]) -> str:
    """Every delta's singular values relative to its largest, and the median of them."""
    curves = [[value / row["spectrum"][0] for value in row["spectrum"]] for row in deltas if row.get("spectrum")]

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        floor = 1e-6
        alpha = max(0.12, min(0.6, 6 / len(curves)))
        for curve in curves:
            shown = [max(value, floor) for value in curve]
            axes.plot(range(1, len(shown) + 1), shown, color=ACCENT, alpha=alpha, linewidth=0.9)
        longest = max(map(len, curves))
        middle = []
        for index in range(longest):
            here = sorted(curve[index] for curve in curves if len(curve) > index)
            middle.append(max(here[len(here) // 2], floor))
        axes.plot(range(1, longest + 1), middle, color=SECOND, marker="o", markersize=3, label="median of all deltas")
        axes.set(xlabel="singular value, largest first", ylabel="relative to the largest")
        log_scale(axes.yaxis, max(min(map(min, curves)), floor), 1.0, "{:g}".format)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend(loc="best")

    return drawn("spectrum", paint)


def rank_plot(deltas: Sequence[dict[str, Any]]) -> str:
    """Effective rank of every delta in the order of the sites, below the rank it was trained with."""
    rows = [row for row in deltas if row.get("effective_rank") is not None]

    def paint(axes: Any) -> None:
        at = range(1, len(rows) + 1)
        nominal = [(x, row["rank"]) for x, row in zip(at, rows, strict=True) if row["rank"]]
        size = 16 if len(rows) <= 80 else 6
        if nominal:
            axes.scatter(*zip(*nominal, strict=True), marker="_", s=size, color=MUTED, label="trained rank")
        values = [row["effective_rank"] for row in rows]
        axes.scatter(at, values, s=size, color=ACCENT, linewidths=0, label="effective rank")
        axes.set(xlabel="delta, in the model's order", ylabel="rank")
        axes.set_ylim(0, 1.3 * max([*values, *(rank for _, rank in nominal)]))
        axes.legend(loc="upper center", ncols=2)

    return drawn("ranks", paint)


def survival_plot(deltas: Sequence[dict[str, Any]]) -> str:
    """What the rounding took of every delta, the largest loss first."""
    lost = sorted((max(1.0 - row["survived"], 1e-9) for row in deltas if row.get("survived") is not None), reverse=True)

    def paint(axes: Any) -> None:
        axes.scatter(range(1, len(lost) + 1), lost, s=16 if len(lost) <= 80 else 6, color=ACCENT, linewidths=0)
        axes.set(xlabel="delta, largest loss first", ylabel="share of ΔW lost")
        log_scale(axes.yaxis, min(lost) / 2, min(max(lost) * 2, 1.0), _in_percent)

    return drawn("survived", paint)


def _in_percent(value: float) -> str:
    """Without an exponent, since a tick is read at a glance."""
    text = f"{100 * value:.8f}".rstrip("0").rstrip(".")
    return f"{text} %"


def rounding_plot(errors: dict[str, Any]) -> str:
    """Errors of the written weights' elements in half ulps; one correct rounding stays within ±1."""
    edges, counts = errors["edges"], errors["counts"]

    def paint(axes: Any) -> None:
        total = sum(counts) or 1
        widths = [high - low for low, high in pairwise(edges)]
        axes.bar(edges[:-1], [100 * n / total for n in counts], widths, align="edge", color=ACCENT, alpha=0.75)
        for edge in (-1.0, 1.0):
            axes.axvline(edge, color=BAD if errors["beyond"] else MUTED, linestyle="--", linewidth=0.9)
        axes.set(xlabel="error of an element, in half ulps", ylabel="elements, %", xlim=(-1.25, 1.25))
        axes.grid(axis="x", color=LINE, alpha=0.0)

    return drawn("rounding", paint)
