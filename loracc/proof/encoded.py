"""The fold of a quantized weight against a float64 oracle.

Which grid was chosen, and which code for every element, is computed here once more, by other code than the fold's:

1. a block in which no delta changes anything has the base's codes, scale and zero point;
2. any other has the base's scale and zero point, or those that round-to-nearest gives for its new extremes;
3. and of the two those that lose less;
4. every code is the one whose value is nearest to W + ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loracc.blas import one_blas_thread
from loracc.dtypes import Array, unit_roundoff
from loracc.encodings.decoded import DecodedTensor
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Grid
from loracc.encodings.site_grid import SiteGrid
from loracc.folded import Binding
from loracc.proof.chosen_codes import STEPS, site_noise
from loracc.proof.oracle import oracle_slabs
from loracc.proof.verdict import WeightSite
from loracc.requantized import turned_layout
from loracc.sites import Layout
from loracc.tensors import read_rows

__all__ = ["check_encoded", "same_parts"]

#: Of float64 arithmetic on a position among the codes.
_SLACK = 1e-9
_REQUIRED = 1.0


def same_parts(before: DecodedTensor, after: DecodedTensor) -> bool:
    """Codes, scales and zero points byte for byte."""
    ours, theirs = before.weight, after.weight
    return not ours.same_scheme(theirs) and all(
        mine is other or (mine is not None and other is not None and mine.tobytes() == other.tobytes())
        for mine, other in ((ours.codes, theirs.codes), (ours.scales, theirs.scales), (ours.zeros, theirs.zeros))
    )


@dataclass
class _Found:
    """What the rows add up to."""

    elements: int = 0
    wrong: int = 0
    excess: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    weight: float = 0.0
    change: float = 0.0
    along: float = 0.0
    step: float = 0.0


def check_encoded(
    name: str,
    before: DecodedTensor,
    after: DecodedTensor,
    bindings: Sequence[Binding],
    leader: tuple[DecodedTensor, DecodedTensor] | None = None,
    *,
    calibrated: bool = False,
) -> tuple[WeightSite, float]:
    """One bound weight of the output; the norm of ΔW.

    Args:
        name: Its initializer in the output.
        before: The base's weight, with its original where the fold began there.
        after: The output's.
        bindings: The deltas.
        leader: Of the bias of an integer operator: that operator's weight in the base and in the output. The bias's
            scale is then that weight's times a constant, and rules 1 to 3 are about the weight only.
        calibrated: The codes were chosen: sites that are not rounded to nearest are held to the promises of
            :mod:`loracc.proof.chosen_codes`.
    """
    weight, made = before.weight, after.weight
    if other := weight.same_scheme(made):
        return _unlike(name, weight, bindings, other), 0.0
    exact = _oracle(before, after, bindings)
    if leader is None:
        seen = _seen(before, made.grid(), exact)
        touched, reasons = seen.touched, _grid_reasons(weight, made, seen)
    else:
        touched = np.ones(weight.blocks.grid, bool)
        reasons = _follows(weight, made, *(tensor.weight for tensor in leader))
    found, grid = _Found(), made.grid()
    base = before.exact()
    with one_blas_thread():
        for lo, hi in weight.spans():
            changed = weight.blocks.expand(touched[weight.blocks.rows(lo, hi)], hi - lo)
            values = read_rows(base, lo, hi), exact[lo:hi]
            _look(found, grid.part(lo, hi), (weight, made), (lo, hi), values, changed)
    required = _REQUIRED
    if calibrated and leader is None and len(weight.shape) == 2 and (found.wrong or reasons):
        required, found.excess, reasons = 0.0, *_chosen(before, made, bindings, seen, exact)
    elif found.wrong:
        share = 100.0 * found.wrong / found.elements
        reasons.append(f"{found.wrong} codes ({share:.3g} %) are not those nearest to W + ΔW")
        if before.original is None and found.change and 0.5 < found.along / found.change < 1.5:
            reasons.append("which an output that was folded with --base shows when it is verified without")
    norm = math.sqrt(found.change)
    site = WeightSite(
        name=", ".join(dict.fromkeys(binding.site.name for binding in bindings)),
        initializer=name,
        adapter=", ".join(dict.fromkeys(binding.adapter for binding in bindings)),
        dtype=f"{weight.op_type} {weight.bits} bit",
        correctly_rounded=1.0 - found.wrong / max(found.elements, 1),
        required=required,
        worst_excess=found.excess,
        max_relative_error=found.error / found.largest if found.largest else found.error,
        relative_norm=norm / math.sqrt(found.weight) if found.weight else None,
        survived=found.along / found.change if found.change else None,
        reason=", ".join(reasons),
        tolerance=(found.step if required else STEPS * found.step) / (found.largest or 1.0),
    )
    return site, norm


def _chosen(
    before: DecodedTensor, made: EncodedWeight, bindings: Sequence[Binding], seen: _Seen, exact: Array
) -> tuple[float, list[str]]:
    """Where codes were chosen: how far the furthest is beside what it may be, and what does not hold."""
    weight, new = before.weight, made.grid()
    reasons = _grid_reasons(weight, made, seen)
    original, codes, count = before.exact().numpy(), made.read_codes(0, len(exact)), len(exact)
    touched = np.broadcast_to(new.blocks.expand(seen.touched, count), exact.shape)
    layouts = dict.fromkeys(_at_codes(before, binding.site.layout) for binding in bindings)
    sites = [(SiteGrid.of(new, layout), layout.view) for layout in layouts]
    furthest = 0.0
    for grid, view in sites:
        noise, nearest = site_noise(grid, *map(view, (codes, original, exact, touched)))
        furthest = max(furthest, noise.furthest / STEPS)
        reasons += [] if nearest else noise.broken()
    rest = touched.copy()
    for _, view in sites:
        view(rest)[...] = False
    whole = SiteGrid.of(new, Layout())
    _, nearest = site_noise(whole, codes, original, exact, rest)
    if not nearest:
        reasons.append("codes of no bound site are not the nearest ones")
    stay = ~touched & (codes != weight.read_codes(0, count))
    if stay.any():
        reasons.append(f"{int(stay.sum())} codes changed in blocks that no delta changes")
    return furthest, list(dict.fromkeys(reasons))


def _at_codes(tensor: DecodedTensor, layout: Layout) -> Layout:
    return turned_layout(layout) if tensor.turned else layout


def _kept(weight: EncodedWeight, made: EncodedWeight) -> Array:
    old, new = weight.grid(), made.grid()
    return (old.scales == new.scales) & (old.zeros == new.zeros)


def _unlike(name: str, weight: EncodedWeight, bindings: Sequence[Binding], reason: str) -> WeightSite:
    sites = dict.fromkeys(binding.site.name for binding in bindings)
    adapters = dict.fromkeys(binding.adapter for binding in bindings)
    dtype = f"{weight.op_type} {weight.bits} bit"
    worst = math.inf
    return WeightSite(
        ", ".join(sites), name, ", ".join(adapters), dtype, 0.0, _REQUIRED, worst, worst, None, None, reason, 0.0
    )


def _oracle(before: DecodedTensor, after: DecodedTensor, bindings: Sequence[Binding]) -> Array:
    """W + ΔW in float64, whole, with the axes of the codes."""
    base, made = before.exact(), after.exact()
    exact = base.numpy()
    groups: dict[Layout, list[Binding]] = {}
    for binding in bindings:
        layout = _at_codes(before, binding.site.layout)
        groups.setdefault(layout, []).append(replace(binding, site=replace(binding.site, layout=layout)))
    for layout, group in groups.items():
        view, at = layout.view(exact), 0
        axis = layout.tiled_axis
        for _, slab, _, _ in oracle_slabs(base, made, layout, group):
            length = slab.shape[axis]
            view[(slice(None),) * axis + (slice(at, at + length),)] = slab
            at += length
    return exact


@dataclass
class _Seen:
    """Per block: whether a delta changes it, its extremes, and what the base's grid and the output's lose."""

    touched: Array
    least: Array
    most: Array
    lost: list[Array]


def _seen(before: DecodedTensor, new: Grid, exact: Array) -> _Seen:
    """Look at all rows, some at a time."""
    weight, blocks, base = before.weight, before.weight.blocks, before.exact()
    grids = (weight.grid(), new)
    shape = blocks.grid
    seen = _Seen(
        np.zeros(shape, bool), np.full(shape, np.inf), np.full(shape, -np.inf), [np.zeros(shape), np.zeros(shape)]
    )
    for lo, hi in weight.spans():
        rows, part = blocks.rows(lo, hi), exact[lo:hi]
        seen.touched[rows] |= blocks.reduce(np.logical_or, part != read_rows(base, lo, hi))
        seen.least[rows] = np.minimum(seen.least[rows], blocks.reduce(np.minimum, part))
        seen.most[rows] = np.maximum(seen.most[rows], blocks.reduce(np.maximum, part))
        for lost, grid in zip(seen.lost, grids, strict=True):
            lost[rows] += _lost(grid.part(lo, hi), part)
    return seen


def _look(
    found: _Found,
    grid: Grid,
    weights: tuple[EncodedWeight, EncodedWeight],
    span: tuple[int, int],
    values: tuple[Array, Array],
    changed: Array,
) -> None:
    """Rule 4, and rule 1 for the codes."""
    old, codes = (weight.read_codes(*span) for weight in weights)
    original, exact = values
    scales, zeros = (grid.blocks.expand(array, len(codes)) for array in (grid.scales, grid.zeros))
    step = np.abs(scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        ideal = np.clip(exact / scales + zeros, grid.low, grid.high)
    off = np.abs(codes - ideal)
    judged = changed & (step > 0)
    wrong = np.where(judged, off > 0.5 + _SLACK * (1.0 + np.abs(ideal)), codes != old)
    found.elements += codes.size
    found.wrong += int(np.count_nonzero(wrong))
    found.excess = max(found.excess, float(np.max(2.0 * off, where=judged, initial=0.0)))
    made = (codes - zeros) * scales
    change, moved = exact - original, np.where(changed, made - original, 0.0)
    found.error = max(found.error, float(np.abs(made - exact).max(initial=0.0)))
    found.largest = max(found.largest, float(np.abs(exact).max(initial=0.0)))
    found.step = max(found.step, float(step.max(initial=0.0)))
    found.weight += float(np.vdot(original, original))
    found.change += float(np.vdot(change, change))
    found.along += float(np.vdot(moved, change))


def _grid_reasons(weight: EncodedWeight, made: EncodedWeight, seen: _Seen) -> list[str]:
    """Rules 1 to 3 for scales and zero points."""
    new, touched, kept = made.grid(), seen.touched, _kept(weight, made)
    reasons = []
    if (~touched & ~kept).any():
        reasons.append(f"{int((~touched & ~kept).sum())} blocks that no delta changes have another scale")
    if not (np.isfinite(new.scales).all() and np.isfinite(new.zeros).all()):
        return [*reasons, "scales or zero points are inf or NaN"]
    strange = touched & ~kept & ~_by_rule(weight, new, seen.least, seen.most)
    if strange.any():
        reasons.append(f"{int(strange.sum())} blocks have a scale or zero point that neither the base nor the rule has")
    worse = touched & ~kept & (seen.lost[1] > seen.lost[0] * (1.0 + _SLACK))
    if worse.any():
        reasons.append(f"{int(worse.sum())} blocks lose more than with the scale they had")
    return reasons


def _follows(weight: EncodedWeight, made: EncodedWeight, before: EncodedWeight, after: EncodedWeight) -> list[str]:
    """Whether the ratio of a bias's scale to its weight's is what it was, and its zero points too."""
    old, new = (
        bias.grid().scales.ravel() / lead.grid().scales.ravel() for bias, lead in ((weight, before), (made, after))
    )
    if np.abs(new - old).max(initial=0.0) > 2.0**-21 * np.abs(old).max(initial=0.0):
        return ["a bias's scale is not the one that its operator's weight asks for"]
    same = np.array_equal(weight.grid().zeros, made.grid().zeros)
    return [] if same else ["a bias has other zero points"]


def _by_rule(weight: EncodedWeight, new: Grid, least: Array, most: Array) -> Array:
    """Whether each block's grid is what round-to-nearest gives for its extremes."""
    rule = weight.rule()
    relative = 2.0 * unit_roundoff(weight.scales.dtype)
    zeros = new.zeros
    if rule.symmetric:
        # The grid's two ends hold the block, and one of them is an extreme of it.
        ends = [(rule.low - zeros) * new.scales, (rule.high - zeros) * new.scales]
        if rule.negative_scales:
            extreme = np.where(np.abs(most) > np.abs(least), most, least)
            return np.abs(ends[0] - extreme) <= relative * np.abs(extreme)
        reach = np.maximum(most, 0), np.minimum(least, 0)
        above = np.where(rule.high - zeros > 0, reach[0] / np.maximum(rule.high - zeros, 1), 0.0)
        below = np.where(rule.low - zeros < 0, reach[1] / np.minimum(rule.low - zeros, -1), 0.0)
        wanted = np.maximum(above, below)
        return np.abs(new.scales - wanted) <= relative * wanted
    span = np.maximum(most, 0) - np.minimum(least, 0)
    scale_fits = np.abs(new.scales * (rule.high - rule.low) - span) <= relative * span
    ideal = np.clip(rule.low - np.minimum(least, 0) / np.where(new.scales == 0, 1, new.scales), rule.low, rule.high)
    slack = 0.5 + _SLACK if rule.zero_dtype is None else 2.0 * unit_roundoff(rule.zero_dtype) * (1.0 + np.abs(ideal))
    return scale_fits & (np.abs(zeros - ideal) <= slack)


def _lost(grid: Grid, exact: Array) -> Array:
    """Per block of some rows, the squared distance of the nearest values of their grid."""
    scales, zeros = (grid.blocks.expand(array, len(exact)) for array in (grid.scales, grid.zeros))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.rint(exact / scales + zeros), grid.low, grid.high)
    values = np.where(scales == 0, 0.0, (np.nan_to_num(codes) - zeros) * scales)
    return grid.blocks.reduce(np.add, np.square(values - exact))
