"""The fold as a lazy tensor: W' = round(W + ΣΔW), computed when a target writes it and one tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
from threadpoolctl import ThreadpoolController

from loracc.adapter import Delta
from loracc.dtypes import Array, compute_dtype, round_to
from loracc.errors import NumericsError
from loracc.sites import Site
from loracc.tensors import TiledTensor, dims, read_rows, tile_rows

__all__ = ["Binding", "FoldedTensor", "annotate", "bindings_of"]

_BINDINGS = "loracc.bindings"


@dataclass(frozen=True)
class Binding:
    """A delta at its site.

    Attributes:
        site: Where it acts.
        delta: What it does; its shape fits the site's canonical shape.
        adapter: Name of the adapter it comes from.
        key: The adapter's own name for it (``module.parameter``).
        way: How the key found its site: "recorded", "name", "scope", "content", "map", "graph".
    """

    site: Site
    delta: Delta
    adapter: str
    key: str
    way: str


def annotate(model: ir.Model, bindings: Sequence[Binding]) -> None:
    """Attach bindings to the initializers they act on (``Value.meta``); the passes after this one read them there."""
    for binding in bindings:
        value = model.graph.initializers[binding.site.initializer]
        value.meta[_BINDINGS] = (*value.meta.get(_BINDINGS, ()), binding)


def bindings_of(value: ir.Value) -> tuple[Binding, ...]:
    """The bindings annotated on one initializer, in the order they were bound."""
    bindings: tuple[Binding, ...] = value.meta.get(_BINDINGS, ())
    return bindings


class FoldedTensor(TiledTensor):
    """An initializer with deltas folded in.

    Replacements act first, then every other delta in order, each as a change to the value *before* any of them:
    W' = round(R + Σᵢ (δᵢ(R) − R)) with R the replaced W. For additive kinds that is the exact sum; a single kind that is
    not additive (DoRA) is its own value. Computed in ``compute_dtype`` and rounded once (DESIGN.md 4).

    Args:
        base: The original weight; it stays where it is and is read in tiles.
        bindings: What to fold, all on sites of this initializer.
        dtype: Output dtype, when it is to differ from the base's.
    """

    def __init__(self, base: ir.TensorProtocol, bindings: Sequence[Binding], dtype: ir.DataType | None = None) -> None:
        super().__init__(dtype or base.dtype, dims(base), base.name)
        self.base = base
        self.bindings = tuple(sorted(bindings, key=lambda b: not b.delta.replaces))
        self._statistics: dict[int, Array | None] = {}

    def compute_rows(self, lo: int, hi: int) -> Array:
        with _blas().limit(limits=1, user_api="blas"):  # same bits for any thread count
            exact = self.exact_rows(lo, hi)
            rounded = round_to(exact, self.dtype)
        self._check_finite(rounded, lo, hi)
        return rounded

    def exact_rows(self, lo: int, hi: int, dtype: np.dtype[np.generic] | None = None) -> Array:
        """Rows ``lo`` to ``hi`` before the rounding, in the compute dtype or a higher one."""
        stored = read_rows(self.base, lo, hi).astype(dtype or compute_dtype(self.dtype))
        for site in dict.fromkeys(binding.site for binding in self.bindings):
            self._apply_site(stored, site, lo, hi)
        return stored

    def _apply_site(self, stored: Array, site: Site, lo: int, hi: int) -> None:
        """Change the part of a stored tile that is ``site``'s, in place."""
        axis = site.layout.tiled_axis
        view, start, stop = self._slab(stored, site, lo, hi)
        if start >= stop:
            return
        for binding in self._of(site, replaces=True):
            _assign(view, binding.delta.apply_slab(view, axis, start, stop))
        changes = self._of(site, replaces=False)
        if len(changes) == 1 or all(binding.delta.additive for binding in changes):
            for binding in changes:
                _assign(view, binding.delta.apply_slab(view, axis, start, stop, self._statistic(binding)))
        else:
            original = view.copy()
            for binding in changes:
                view += (
                    binding.delta.apply_slab(original.copy(), axis, start, stop, self._statistic(binding)) - original
                )

    def _slab(self, stored: Array, site: Site, lo: int, hi: int) -> tuple[Array, int, int]:
        """The site's part of the stored rows ``lo:hi`` as a canonical view, and its range on the site's tiled axis."""
        layout = site.layout
        if layout.tiled_axis != 0 or layout.whole:
            return layout.view(stored), lo, hi
        # A block of the stored rows: the tile may hold some of it, or none.
        block_stop = dims(self)[layout.perm[0] if layout.perm else 0] if layout.stop is None else layout.stop
        first, last = max(lo, layout.start), min(hi, block_stop)
        permuted = stored.transpose(layout.perm) if layout.perm else stored
        return permuted[max(first - lo, 0) : max(last - lo, 0)], first - layout.start, last - layout.start

    def _of(self, site: Site, *, replaces: bool) -> list[Binding]:
        return [b for b in self.bindings if b.site == site and b.delta.replaces == replaces]

    def _statistic(self, binding: Binding) -> Array | None:
        """What the delta's first pass over the weight found; computed once, when first asked for."""
        if id(binding) not in self._statistics:
            site, shape = binding.site, dims(self)
            axis = site.layout.tiled_axis
            length = site.layout.canonical_shape(shape)[axis] if shape else 1
            step = tile_rows(shape, int(self.base.dtype.itemsize))
            self._statistics[id(binding)] = binding.delta.prepare(
                lambda lo, hi: self._replaced_slab(site, lo, hi), axis, length, step
            )
        return self._statistics[id(binding)]

    def _replaced_slab(self, site: Site, start: int, stop: int) -> Array:
        """Canonical slab of the weight with replacements done and nothing else, in the compute dtype."""
        offset = site.layout.start if site.layout.tiled_axis == 0 else 0
        stored = read_rows(self.base, start + offset, stop + offset).astype(compute_dtype(self.dtype))
        view, _, _ = self._slab(stored, site, start + offset, stop + offset)
        for binding in self._of(site, replaces=True):
            _assign(view, binding.delta.apply_slab(view, site.layout.tiled_axis, start, stop))
        return view

    def _check_finite(self, rounded: Array, lo: int, hi: int) -> None:
        if np.isfinite(rounded).all():
            return
        before = np.isfinite(read_rows(self.base, lo, hi).astype(np.float32)).all()
        names = ", ".join(sorted({binding.site.name for binding in self.bindings}))
        raise NumericsError(
            f"folding {names}: the weight would hold inf or NaN in {self.dtype.name} "
            + ("(the base weight is finite)." if before else "(the base weight itself already does)."),
            hint="The adapter is too strong for this dtype, or damaged: check its scale, or fold with --dtype fp32.",
        )


@cache
def _blas() -> ThreadpoolController:
    """Found once: looking the libraries up costs milliseconds."""
    return ThreadpoolController()


def _assign(view: Array, value: Array) -> None:
    """``view[...] = value``, without the copy where a delta worked in place."""
    if value is not view:
        view[...] = value
