"""An adapter's factors as the parameters of a graph with branches: A's side by side, B's in blocks, the scale in B.

Of a branch with sites 1, 2, ... (DESIGN.md 6):

    A = [A₁ᵀ | A₂ᵀ | ...]            [features, Σr]
    B = rows of site i:  sᵢ·Bᵢᵀ in the columns of site i, zero elsewhere

Several deltas at one site are one of rank Σr: their exact sum (FORMATS.md 10). Everything is computed in float64 and
rounded once into the graph's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.algebra.low_rank import low_rank_norm
from loracc.deltas import LowRank
from loracc.dtypes import Array, all_finite, round_to
from loracc.errors import BindingError, NumericsError
from loracc.folded import Binding
from loracc.manifest import Branch, Manifest

__all__ = ["Packed", "pack"]


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` made.

    Attributes:
        parameters: By name: A ``[features, rank]``, B ``[rank, out]``, in the graph's type.
        survived: By site: 1 − ‖ΔW of the parameters − ΔW‖ / ‖ΔW‖; None where ΔW is zero.
        rank: The largest Σr of a site.
    """

    parameters: dict[str, Array]
    survived: dict[str, float | None]
    rank: int


def pack(manifest: Manifest, bindings: Sequence[Binding]) -> Packed:
    """The parameters of the branches that have a delta; the others keep what the graph has.

    Args:
        manifest: Of the graph.
        bindings: Low-rank deltas; several at one site add up.

    Raises:
        BindingError: The graph has no branch at a site.
        NumericsError: A parameter does not fit the graph's type.
    """
    deltas: dict[str, list[LowRank]] = {}
    for binding in bindings:
        assert isinstance(binding.delta, LowRank)
        deltas.setdefault(binding.site.name, []).append(binding.delta)
    _refuse_unknown(manifest, bindings)
    dtype = ir.DataType[manifest.dtype]
    parameters: dict[str, Array] = {}
    survived: dict[str, float | None] = {}
    for branch in manifest.branches:
        exact = _branch(branch, deltas)
        rounded = {name: _rounded(array, dtype, name) for name, array in exact.items()}
        parameters |= rounded
        survived |= _survived(branch, deltas, exact, rounded)
    rank = max((sum(delta.rank for delta in found) for found in deltas.values()), default=0)
    return Packed(parameters, survived, rank)


def _refuse_unknown(manifest: Manifest, bindings: Sequence[Binding]) -> None:
    known = {place.site for branch in manifest.branches for _, place in branch.sites()}
    missing = [binding for binding in bindings if binding.site.name not in known]
    if missing:
        lines = [f"  {binding.site.name} (adapter {binding.adapter!r})" for binding in missing]
        raise BindingError(
            f"{len(missing)} site(s) of the adapter have no branch in the graph:\n" + "\n".join(lines),
            hint=f"The graph has branches at {len(known)} sites, those of the adapters it was made with. Attach this "
            "adapter to the base together with them.",
        )


def _branch(branch: Branch, deltas: Mapping[str, Sequence[LowRank]]) -> dict[str, Array]:
    """A and B's in float64; nothing when no site of the branch has a delta."""
    here = [(weight, place, delta) for weight, place in branch.sites() for delta in deltas.get(place.site, ())]
    if not here:
        return {}
    rank = sum(delta.rank for _, _, delta in here)
    a = np.zeros((branch.features, rank))
    bs = {weight.name: np.zeros((rank, weight.out)) for weight in branch.weights}
    first = 0
    for weight, place, delta in here:
        left, right = _factors(delta, branch.kind)
        last = first + delta.rank
        a[:, first:last] = left
        bs[weight.name][first:last, place.start : place.stop] = right
        first = last
    return {branch.name: a, **bs}


def _factors(delta: LowRank, kind: str) -> tuple[Array, Array]:
    """(A ``[features, r]``, B ``[r, out]``) of one delta in float64, the scale in B."""
    a, b = delta.a.reshape(delta.rank, -1).astype(np.float64), delta.b.astype(np.float64)
    # The rows of an embedding's weight are what is looked up: its ΔW = s·b·a has the factors in this order already.
    return (b, delta.s * a) if kind == "embedding" else (a.T, delta.s * b.T)


def _rounded(exact: Array, dtype: ir.DataType, name: str) -> Array:
    rounded = round_to(exact, dtype)
    if not all_finite(rounded):
        raise NumericsError(
            f"{name}: the adapter's values do not fit the graph's type {dtype.name}.",
            hint="The scale is multiplied into B: is it right? Or attach to a float32 base: --dtype fp32.",
        )
    return np.ascontiguousarray(rounded)


def _survived(
    branch: Branch, deltas: Mapping[str, Sequence[LowRank]], exact: Mapping[str, Array], rounded: Mapping[str, Array]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    first = 0
    for weight, place in branch.sites():
        last = first + sum(delta.rank for delta in deltas.get(place.site, ()))
        if last > first:
            columns, rows = np.s_[:, first:last], np.s_[first:last, place.start : place.stop]
            pairs = [(m[branch.name][columns], m[weight.name][rows]) for m in (exact, rounded)]
            found[place.site] = _kept(*[(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs])
        first = last
    return found


def _kept(exact: tuple[Array, Array], rounded: tuple[Array, Array]) -> float | None:
    """1 − ‖A'B' − AB‖ / ‖AB‖ without forming either product: A'B' − AB = (A'−A)·B' + A·(B'−B)."""
    (a, b), (a2, b2) = exact, rounded
    size = low_rank_norm(a, b, 1.0)
    lost = low_rank_norm(np.concatenate([a2 - a, a], axis=1), np.concatenate([b2, b2 - b], axis=0), 1.0)
    return max(0.0, 1.0 - lost / size) if size else None
