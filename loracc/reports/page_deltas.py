"""The page's sections on the deltas: where, how strong, over how many directions, and what the rounding left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from statistics import median
from typing import Any

from loracc.reports.page_parts import figure, section, table
from loracc.reports.plots_deltas import heat_map, rank_plot, rounding_plot, spectrum_plot, survival_plot
from loracc.reports.report_body import deltas_of
from loracc.reports.report_places import grid_of, in_order
from loracc.reports.report_view import delta_cells, folded_where, share
from loracc.reports.words import counted, number

__all__ = ["delta_sections"]

#: Rows up to which the table is one; longer ones are folded away by layer.
_ONE_TABLE = 16
#: Columns of the heat map from which it takes the whole width.
_BROAD = 7


def delta_sections(body: dict[str, Any]) -> Iterator[str]:
    """Nothing where no delta is known of."""
    deltas = deltas_of(body)
    if deltas:
        yield from _strength(deltas)
        yield from _directions(deltas)
        yield from _rounding(deltas, body.get("rounding_errors"))
        yield from _listed(deltas)


def _strength(deltas: Sequence[dict[str, Any]]) -> Iterator[str]:
    grid = grid_of(deltas)
    if not grid.values:
        return
    said = "How strongly the adapter changes each weight: ‖ΔW‖ in relation to ‖W‖."
    yield from section("What was changed, and how much", said)
    (layer, projection), value = max(grid.values.items(), key=lambda item: item[1])
    strongest = f"Strongest: {'.'.join(filter(None, (layer, projection)))} at {number(value)}."
    broad = len(grid.projections) >= _BROAD or len(grid.layers) > 16
    yield figure("‖ΔW‖/‖W‖ by layer and projection", heat_map(grid), strongest, broad=broad)


def _directions(deltas: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [row for row in deltas if row.get("spectrum")]
    if not rows:
        return
    yield from section(
        "Directions",
        "A delta of rank r can act in r directions; its singular values say how much it uses each. An effective rank "
        "far below the trained one means that a smaller rank would have done.",
    )
    left = len(deltas) - len(rows)
    without = f" {counted(left, 'delta')} without: see the table." if left else ""
    ranks = [row["effective_rank"] for row in rows]
    span = f"Effective rank {min(ranks):.1f} to {max(ranks):.1f}, median {median(ranks):.1f}.{without}"
    yield '<div class="plots">'
    yield figure("Singular values", spectrum_plot(rows), f"A line for each of {counted(len(rows), 'delta')}.")
    yield figure("Effective rank", rank_plot(rows), span)
    yield "</div>"


def _rounding(deltas: Sequence[dict[str, Any]], errors: dict[str, Any] | None) -> Iterator[str]:
    kept = [(row["survived"], row["name"]) for row in deltas if row.get("survived") is not None]
    measured = errors if errors and errors["elements"] else None
    if not kept and measured is None:
        return
    said = "W + ΔW is rounded once into the weight's own type. What is smaller than a rounding step is lost."
    yield from section("What the rounding left", said)
    yield '<div class="plots">'
    if kept:
        least, where = min(kept)
        yield figure("Lost of each delta", survival_plot(deltas), f"Least survived at {where}: {share(least)}.")
    if measured is not None:
        beyond, looked = measured["beyond"], measured["elements"]
        text = f"{looked:,} sampled elements of the written weights; {beyond:,} further than one rounding explains."
        text += f" {counted(measured['skipped'], 'weight')} not sampled." if measured["skipped"] else ""
        yield figure("Errors of the written weights", rounding_plot(measured), text)
    yield "</div>"


_HEADS = ("site", "adapter", "kind", "rank", "scale", "‖ΔW‖/‖W‖", "survived", "eff. rank", "bound by", "remark")


def _listed(deltas: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from section("Every delta")
    if len(deltas) <= _ONE_TABLE:
        yield _table(deltas)
        return
    groups = folded_where(deltas)
    for layer in in_order(list(groups)):
        rows = groups[layer]
        norms = [row["relative_norm"] for row in rows if row.get("relative_norm") is not None]
        span = f", ‖ΔW‖/‖W‖ {number(min(norms))} to {number(max(norms))}" if norms else ""
        bad = sum(row.get("verdict") == "fail" for row in rows)
        wrong = f", {bad} wrong" if bad else ""
        opened = " open" if bad else ""
        yield f"<details{opened}><summary>{escape(layer or 'in no layer')}"
        yield f"<span>{escape(counted(len(rows), 'delta') + span + wrong)}</span></summary>{_table(rows)}</details>"


def _table(deltas: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            *delta_cells(row),
            row.get("way") or "-",
            "; ".join(filter(None, (row.get("reason"), row.get("note")))),
        )
        for row in deltas
    ]
    return table(_HEADS, rows, numbers=(3, 4, 5, 6, 7), extra=(1, 2, 4, 7, 8))
