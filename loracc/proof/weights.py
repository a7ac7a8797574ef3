"""The weights of the output against a float64 oracle, and every other tensor byte for byte (DESIGN.md 4 and 5).

Each bound weight is compared slab by slab; every other tensor, and every row of a fused weight that no delta is bound
to, must have the base's bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.blas import one_blas_thread
from loracc.dtypes import Array, is_float, round_to, unit_roundoff
from loracc.encodings.decoded import DecodedTensor
from loracc.folded import Binding, FoldedTensor
from loracc.parallel import in_order
from loracc.passes.link_biases import linked_biases
from loracc.passes.unshare import delta_digest
from loracc.progress import NoProgress, Progress
from loracc.proof.calibrated import Noise, relative_tolerance
from loracc.proof.encoded import check_encoded, same_parts
from loracc.proof.oracle import half_ulp, in_small_slabs, oracle_slabs
from loracc.proof.structure import Pair
from loracc.proof.verdict import Weights, WeightSite
from loracc.sites import Layout
from loracc.tensors import dims, read_rows, tile_rows

__all__ = ["SLACK", "check_untouched", "check_weights", "required_share", "same_bytes"]

#: DESIGN.md 4: what float32 arithmetic before the rounding may cost, relative to |W| + |s|Σ|B||A|.
SLACK = 2.0**-21
#: Weights of 32 bits and more are summed in float64: one that is an ulp off was not rounded once.
_WIDE_SLACK = 2.0**-36
_COPY_BYTES = 8 << 20


def required_share(dtype: ir.DataType) -> float:
    """Share of elements that must be the correctly rounded value: 99.99 % of 16-bit ones, 99.9 % of wider ones."""
    return 0.9999 if dtype.bitwidth <= 16 else 0.999


def slack(dtype: ir.DataType) -> float:
    """What an element may be off beside its rounding, relative to |W| + |s|Σ|B||A|."""
    return SLACK if dtype.bitwidth <= 16 else _WIDE_SLACK


def check_weights(
    base: ir.Model,
    out: ir.Model,
    pairs: Sequence[Pair],
    bindings: Sequence[Binding],
    progress: Progress | None = None,
    *,
    calibrated: bool = False,
) -> Weights:
    """Compare every paired initializer.

    Args:
        base: The original graph; a weight that only changes its dtype may be a :class:`FoldedTensor` of no deltas.
        out: What was written.
        pairs: Which initializer of the output stands for which of the base.
        bindings: The deltas, at sites of the base.
        progress: Told of the bytes compared.
        calibrated: Matrices are held to what calibrated rounding promises (:mod:`loracc.proof.calibrated`).
    """
    progress = progress or NoProgress()
    ours, theirs = base.graph.initializers, out.graph.initializers
    leaders = _leaders(base, out, pairs, bindings)
    told = [(pair, _of_pair(pair, bindings)) for pair in pairs]
    alone = threading.Lock()  # one weight that is needed whole, in float64, is in memory at a time

    def compare(told: tuple[Pair, list[Binding]]) -> _Compared:
        pair, here = told
        before, after = _tensor(ours[pair.base]), _tensor(theirs[pair.out])
        with nullcontext() if in_small_slabs([b.delta for b in here]) else alone:
            compared = _compare(pair, before, after, here, leaders.get(pair.base), calibrated=calibrated)
        progress.advance(after.nbytes, pair.out)
        return compared

    progress.begin("verifying", sum(_tensor(theirs[pair.out]).nbytes for pair in pairs))
    try:
        with one_blas_thread():
            compared = in_order(compare, told)
    finally:
        progress.end()
    sites = [one.site for one in compared if one.site is not None]
    changed = [pair.out for pair, one in zip(pairs, compared, strict=True) if one.changed]
    untouched = sum(one.untouched for one in compared)
    seen = {id(binding) for _, here in told for binding in here}
    missing = [binding.site.name for binding in bindings if id(binding) not in seen]
    return _judge(sites, changed, untouched, missing, max((one.effect for one in compared), default=0.0))


@dataclass(frozen=True)
class _Compared:
    """One initializer: a verdict on its deltas and ‖ΔW‖; where none is bound, whether it has the base's bytes."""

    site: WeightSite | None = None
    effect: float = 0.0
    untouched: bool = False
    changed: bool = False


def _compare(
    pair: Pair,
    before: ir.TensorProtocol,
    after: ir.TensorProtocol,
    bindings: Sequence[Binding],
    leader: tuple[DecodedTensor, DecodedTensor] | None,
    *,
    calibrated: bool,
) -> _Compared:
    encoded = isinstance(before, DecodedTensor) and isinstance(after, DecodedTensor)
    if not bindings and not (leader and encoded):
        same = same_bytes(before, after)
        return _Compared(untouched=same, changed=not same)
    if isinstance(before, DecodedTensor) and isinstance(after, DecodedTensor):
        found = check_encoded(pair.out, before, after, _once(bindings), leader, calibrated=calibrated)
        return _Compared(*found) if bindings else _Compared(changed=bool(found[0].reason))
    if not _comparable(before, after):
        return _Compared(_unlike(pair, bindings, before, after))
    chosen = calibrated and len(dims(after)) == 2
    return _Compared(*_check_site(pair.out, before, after, _once(bindings), calibrated=chosen))


def check_untouched(base: ir.Model, out: ir.Model, pairs: Sequence[Pair]) -> Weights:
    """Every paired initializer byte for byte, where no weight is meant to change (deltas stay beside the weights)."""
    ours, theirs = base.graph.initializers, out.graph.initializers
    changed = [pair.out for pair in pairs if not same_bytes(_tensor(ours[pair.base]), _tensor(theirs[pair.out]))]
    reason = f"the bytes of {_listed(changed)} differ from the base's" if changed else ""
    return Weights("fail" if changed else "pass", reason, untouched=len(pairs) - len(changed), changed=tuple(changed))


def _leaders(
    base: ir.Model, out: ir.Model, pairs: Sequence[Pair], bindings: Sequence[Binding]
) -> dict[str, tuple[DecodedTensor, DecodedTensor]]:
    """By name of a bias in integers: the changed weight whose scale it follows, in the base and in the output."""
    places = {pair.base: pair.out for pair in reversed(pairs) if _of_pair(pair, bindings)}
    found = {}
    for weight, bias in linked_biases(base):
        after = out.graph.initializers.get(places.get(str(weight.name), ""))
        tensors = weight.const_value, after.const_value if after is not None else None
        if isinstance(tensors[0], DecodedTensor) and isinstance(tensors[1], DecodedTensor):
            found[str(bias.name)] = (tensors[0], tensors[1])
    return found


def _judge(sites: list[WeightSite], changed: list[str], untouched: int, missing: list[str], effect: float) -> Weights:
    failed = [site for site in sites if site.reason]
    reasons = []
    if missing:
        reasons.append(f"the output has no weight for {_listed(missing)}")
    worst = max(sites, key=lambda site: (bool(site.reason), site.worst_excess), default=None)
    if failed and worst is not None:
        more = f" ({len(failed)} of {len(sites)} weights are wrong)" if len(sites) > 1 else ""
        reasons.append(f"{worst.name}: {worst.reason}{more}")
    if changed:
        reasons.append(f"no delta is bound to {_listed(changed)}, and the bytes differ from the base's")
    if sites and not missing and effect == 0.0:
        reasons.append("no signal: every delta is zero, so a right and a wrong fold look the same")
    if not sites and not missing:
        reasons.append("no signal: no delta is bound to any weight")
    return Weights(
        "fail" if reasons else "pass",
        "; ".join(reasons),
        tuple(sites),
        untouched,
        tuple(changed),
        worst.name if worst else "",
        max((site.max_relative_error for site in sites), default=None),
        # One rounding and the slack, relative to the largest element.
        max((_tolerance(site) for site in sites), default=None),
    )


def _tolerance(site: WeightSite) -> float:
    if site.tolerance is not None:
        return site.tolerance
    dtype = ir.DataType[site.dtype]
    return unit_roundoff(dtype) + 2 * slack(dtype)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise AssertionError(f"initializer {value.name!r} has no value")
    return value.const_value


def _of_pair(pair: Pair, bindings: Sequence[Binding]) -> list[Binding]:
    """The bindings that act on this copy of the base's initializer: all, or those whose reader reads it here.

    A checkpoint's tied head that became a tensor of its own is no reader of what the embedding's deltas change.
    """
    untied = pair.out != pair.base and pair.readers == (pair.out,)
    readers = pair.readers if untied else ("", *pair.readers)
    return [b for b in bindings if b.site.initializer == pair.base and b.site.consumer in readers]


def _once(bindings: Sequence[Binding]) -> list[Binding]:
    """Without the deltas that a tied weight's other readers have equally: they are folded once."""
    readers: dict[str, list[Binding]] = {}
    for binding in bindings:
        readers.setdefault(binding.site.consumer, []).append(binding)
    groups = {tuple(delta_digest(b.delta) for b in group): group for group in readers.values()}
    return [binding for group in groups.values() for binding in group]


def _source(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The weight as it was before a change of dtype."""
    return tensor.base if isinstance(tensor, FoldedTensor) and not tensor.bindings else tensor


def _comparable(before: ir.TensorProtocol, after: ir.TensorProtocol) -> bool:
    return dims(before) == dims(after) and is_float(after.dtype) and is_float(before.dtype)


def _unlike(pair: Pair, bindings: Sequence[Binding], before: ir.TensorProtocol, after: ir.TensorProtocol) -> WeightSite:
    reason = f"{after.dtype.name}{list(dims(after))} in the output, {before.dtype.name}{list(dims(before))} in the base"
    name, adapter = _names(bindings)
    return WeightSite(
        name,
        pair.out,
        adapter,
        after.dtype.name,
        0.0,
        required_share(after.dtype),
        math.inf,
        math.inf,
        None,
        None,
        reason,
    )


def _names(bindings: Sequence[Binding]) -> tuple[str, str]:
    sites = dict.fromkeys(binding.site.name for binding in bindings)
    return ", ".join(sites), ", ".join(dict.fromkeys(binding.adapter for binding in bindings))


def same_bytes(before: ir.TensorProtocol, after: ir.TensorProtocol) -> bool:
    """Byte for byte, in chunks; a weight whose dtype changed must be the base's, rounded once."""
    if isinstance(before, DecodedTensor) and isinstance(after, DecodedTensor):
        return same_parts(before, after)
    if dims(before) != dims(after) or before.dtype != after.dtype:
        return False
    if before.dtype.bitwidth < 8:
        return before.tobytes() == after.tobytes()
    shape = dims(before)
    length = shape[0] if shape else 1
    step = tile_rows(shape, int(before.dtype.itemsize), _COPY_BYTES)
    return all(
        read_rows(before, lo, min(lo + step, length)).tobytes()
        == read_rows(after, lo, min(lo + step, length)).tobytes()
        for lo in range(0, length, step)
    )


@dataclass
class _Sums:
    """What the slabs of one initializer add up to."""

    elements: int = 0
    correct: int = 0
    excess: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    weight: float = 0.0
    change: float = 0.0
    lost: float = 0.0
    finite: bool = True
    foreign: int = 0  # elements of no site that changed
    along: float = 0.0  # <W' − W, ΔW>: over ‖ΔW‖² it is the strength at which the delta is there

    def add(self, original: Array, exact: Array, actual: Array, wrong: Array) -> None:
        """One slab: W, the oracle and W' in float64, and where W' is not the oracle rounded."""
        self.elements += actual.size
        self.correct += actual.size - int(np.count_nonzero(wrong))
        change, lost = exact - original, actual - exact
        self.error = max(self.error, _largest(lost))
        self.largest = max(self.largest, _largest(exact))
        self.weight += _dot(original, original)
        self.change += (squared := _dot(change, change))
        self.lost += _dot(lost, lost)
        self.along += squared + _dot(change, lost)
        self.finite &= math.isfinite(self.error)


def _dot(one: Array, other: Array) -> float:
    return float(np.vdot(one, other))


def _largest(values: Array) -> float:
    """max|v|, NaN counting as inf."""
    if not values.size:
        return 0.0
    largest = max(float(values.max()), -float(values.min()))
    return math.inf if math.isnan(largest) else largest


def _check_site(
    name: str, before: ir.TensorProtocol, after: ir.TensorProtocol, bindings: Sequence[Binding], *, calibrated: bool
) -> tuple[WeightSite, float]:
    """One initializer of the output; also ‖ΔW‖."""
    base, sums, broken = _source(before), _Sums(), list[str]()
    for layout, here in _by_layout(bindings):
        noise, elsewhere, excess = Noise(), 0, 0.0
        for original, exact, actual, magnitude in oracle_slabs(base, after, layout, here):
            wrong = round_to(exact, after.dtype).astype(np.float64) != actual
            with np.errstate(invalid="ignore"):  # inf − inf, when the output holds inf: sums.finite says so
                sums.add(original, exact, actual, wrong)
                if calibrated:
                    noise += Noise.of(original, exact, actual, after.dtype)
                if wrong.any():
                    allowed = half_ulp(exact[wrong], after.dtype) + slack(after.dtype) * magnitude(wrong)
                    excess = max(excess, _largest((actual[wrong] - exact[wrong]) / allowed))
                    elsewhere += int(np.count_nonzero(wrong))
        # A site of which nothing was chosen is held to what rounding to nearest is: it may lose some of a small delta.
        if calibrated and (excess > 1.0 or elsewhere > _allowance(noise.elements, required_share(after.dtype))):
            broken += noise.broken(after.dtype)
            excess = noise.excess(after.dtype)
        sums.excess = max(sums.excess, excess)
    sums.foreign = _foreign(base, after, bindings)
    required = 0.0 if calibrated else required_share(after.dtype)
    site_name, adapter = _names(bindings)
    norm = math.sqrt(sums.change)
    site = WeightSite(
        name=site_name,
        initializer=name,
        adapter=adapter,
        dtype=after.dtype.name,
        correctly_rounded=sums.correct / max(sums.elements, 1),
        required=required,
        worst_excess=sums.excess,
        max_relative_error=sums.error / sums.largest if sums.largest else sums.error,
        relative_norm=norm / math.sqrt(sums.weight) if sums.weight else None,
        survived=max(0.0, 1.0 - math.sqrt(sums.lost) / norm) if norm else None,
        reason=_reason(sums, required, broken if calibrated else None),
        tolerance=relative_tolerance(after.dtype) if calibrated else None,
    )
    return site, norm


def _reason(sums: _Sums, required: float, broken: list[str] | None) -> str:
    """``broken``: promises of calibrated rounding that do not hold; None where every element is to be the nearest."""
    share = sums.correct / max(sums.elements, 1)
    if not sums.finite:
        return "the output's weight holds inf or NaN"
    found = list(dict.fromkeys(broken or ()))
    if sums.elements - sums.correct > _allowance(sums.elements, required):
        found.append(f"{100 * share:.4g} % of its elements are correctly rounded, {100 * required:g} % are needed")
    if sums.excess > 1.0 and broken is None:
        found.append(f"an element is {sums.excess:.3g} times further from W + ΔW than rounding once allows")
    if sums.foreign:
        found.append(f"{sums.foreign} elements outside the bound rows changed")
    return ", ".join(found) + (_diagnosis(sums) if found and sums.change and broken is None else "")


def _allowance(elements: int, required: float) -> float:
    """How many elements may be misrounded: the required share's, and what chance adds to so many (three sigma).

    A tensor of a few hundred elements has one that lies on a tie now and then; such an element is still held to the
    bound on its error.
    """
    expected = (1.0 - required) * elements
    return expected + 3.0 * math.sqrt(expected) + 1.0


def _diagnosis(sums: _Sums) -> str:
    """What is there in place of the delta: nothing, another one, or the same one at another strength."""
    strength = sums.along / sums.change
    remaining = math.sqrt(max(sums.lost - (strength - 1.0) ** 2 * sums.change, 0.0) / sums.change)
    if remaining > 0.5:
        return "; the change that is there is another one"
    if abs(strength) < 1e-3:
        return "; the delta is not there"
    chance = remaining / math.sqrt(sums.elements)
    return f"; the delta is there at {strength:.4g} of its strength" if abs(strength - 1.0) > 5.0 * chance else ""


def _by_layout(bindings: Sequence[Binding]) -> list[tuple[Layout, list[Binding]]]:
    """Sites that lie in the same place (two readers of a tied weight) add up."""
    groups: dict[Layout, list[Binding]] = {}
    for binding in bindings:
        groups.setdefault(binding.site.layout, []).append(binding)
    return list(groups.items())


def _foreign(before: ir.TensorProtocol, after: ir.TensorProtocol, bindings: Sequence[Binding]) -> int:
    """How many elements of no bound site changed (the other blocks of a fused weight)."""
    layouts = {binding.site.layout for binding in bindings}
    if any(layout.whole for layout in layouts) or not dims(after):
        return 0
    shape = dims(after)
    free = np.ones(shape, bool) if len({_rows_axis(layout) for layout in layouts}) > 1 else None
    axis = _rows_axis(next(iter(layouts)))
    outside = np.ones(shape[axis], bool)
    for layout in layouts:
        if free is not None:
            (free.transpose(layout.perm) if layout.perm else free)[layout.start : layout.stop] = False
        outside[layout.start : layout.stop] = False
    step = tile_rows(shape, int(after.dtype.itemsize), _COPY_BYTES)
    count = 0
    for lo in range(0, shape[0], step):
        hi = min(lo + step, shape[0])
        old, new = (read_rows(t, lo, hi) for t in (before, after))
        if old.dtype != new.dtype:
            old = round_to(old.astype(np.float64), after.dtype)
        differs = old.view(f"u{old.dtype.itemsize}") != new.view(f"u{new.dtype.itemsize}")
        if free is not None:
            count += int(np.count_nonzero(differs & free[lo:hi]))
        else:
            mask = outside[lo:hi] if axis == 0 else outside
            count += int(np.count_nonzero(np.compress(mask, differs, axis=axis)))
    return count


def _rows_axis(layout: Layout) -> int:
    """The stored axis that holds the site's rows."""
    return layout.perm[0] if layout.perm else 0
