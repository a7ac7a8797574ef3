"""The fold as a lazy tensor: W' = round(W + ΣΔW), computed when a target writes it and one tile at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.blas import one_blas_thread
from loracc.deltas import Addition, LowRank, StackedLowRank
from loracc.dtypes import Array, all_finite, compute_dtype, round_to
from loracc.errors import NumericsError
from loracc.fused import products_of
from loracc.kernel import Product
from loracc.rows import Rows, RowsBase, give_back
from loracc.sites import Site
from loracc.tensors import TiledTensor, dims, open_rows, read_rows

__all__ = ["Binding", "FoldedTensor", "annotate", "bindings_of", "block_rows", "clear_bindings"]

_BINDINGS = "loracc.bindings"
#: Products that are summed per element, up to which float32 serves bfloat16 weights.
_FLOAT32_RANK = 16
#: Elements of a weight above which the time of float64 arithmetic counts.
_FLOAT32_ELEMENTS = 1 << 20
#: Elements of one compute block: in float32 it stays in a core's second-level cache.
_BLOCK_ELEMENTS = 1 << 17
#: A product of fewer rows spends its time on packing the other factor; more elements than this are never held at once.
_BLOCK_MIN_ROWS, _BLOCK_MAX_ELEMENTS = 16, 1 << 19


@dataclass(frozen=True)
class Binding:
    """A delta at its site.

    Attributes:
        site: Where it acts.
        delta: What it does; its shape fits the site's canonical shape.
        adapter: Name of the adapter it comes from.
        key: The adapter's own name for it (``module.parameter``).
        way: How the key found its site: "recorded", "name", "scope", "content", "map", "graph".
        covers: The adapter's own names for it, where it was taken apart or put together (``Entry.covers``).
    """

    site: Site
    delta: Delta
    adapter: str
    key: str
    way: str
    covers: tuple[str, ...] = ()


def annotate(model: ir.Model, bindings: Sequence[Binding]) -> None:
    """Attach bindings to the initializers they act on (``Value.meta``); the passes after this one read them there."""
    for binding in bindings:
        value = model.graph.initializers[binding.site.initializer]
        value.meta[_BINDINGS] = (*value.meta.get(_BINDINGS, ()), binding)


def bindings_of(value: ir.Value) -> tuple[Binding, ...]:
    """The bindings annotated on one initializer, in the order they were bound."""
    bindings: tuple[Binding, ...] = value.meta.get(_BINDINGS, ())
    return bindings


def clear_bindings(value: ir.Value) -> None:
    """Take every binding off an initializer."""
    value.meta.pop(_BINDINGS, None)


class FoldedTensor(TiledTensor):
    """An initializer with deltas folded in.

    Replacements act first, then every other delta in order, each as a change to the value *before* any of them:
    W' = round(R + Σᵢ (δᵢ(R) − R)) with R the replaced W. For additive kinds that is the exact sum; a single kind that
    is not additive (DoRA) is its own value. Computed in ``compute_dtype`` and rounded once (DESIGN.md 4).

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
        self._lock = threading.Lock()

    def open_rows(self, *, few: bool = False) -> Rows:
        return _FoldedRows(self, few=few)

    def compute_rows(self, lo: int, hi: int) -> Array:
        shape = dims(self)
        result = np.empty((hi - lo, *shape[1:]) if shape else (), self.dtype.numpy())
        with self.open_rows(few=True) as rows:
            rows.fill(lo, hi, result)
        return result

    def probe(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[Array, Array, Array]]:
        """(weight, exact result, rounded result) of some spans of rows: for estimates, and cheaper than asking thrice.

        The rounded values may differ from those of the whole in their last bit (see :func:`block_rows`).
        """
        shape = dims(self)
        folding = _Folding(self, self.compute_dtype)
        with open_rows(self.base, few=True) as base, one_blas_thread():
            for lo, hi in spans:
                stored = np.empty((hi - lo, *shape[1:]) if shape else (), self.base.dtype.numpy())
                base.fill(lo, hi, stored)
                original = stored.astype(self.compute_dtype)
                exact = original.copy()
                folding.apply(exact, lo, hi)
                yield original, exact, round_to(exact, self.dtype)

    def exact_rows(self, lo: int, hi: int, dtype: np.dtype[np.generic] | None = None) -> Array:
        """Rows ``lo`` to ``hi`` before the rounding, in the compute dtype or a higher one."""
        stored = read_rows(self.base, lo, hi).astype(dtype or self.compute_dtype)
        with one_blas_thread():
            _Folding(self, stored.dtype).apply(stored, lo, hi)
        return stored

    @property
    def compute_dtype(self) -> np.dtype[np.generic]:
        """The precision of everything before the one rounding.

        float32 is enough for bfloat16 only while the delta is a short sum: with strong deltas (‖ΔW‖ ≥ ‖W‖) it misrounds
        6·10⁻⁵ of the elements at rank 16, 1.1·10⁻⁴ at rank 64 and 2.6·10⁻⁴ at rank 256, and at most 10⁻⁴ is promised.
        A small weight, of which one element may be more than that, costs nothing in float64.
        """
        short = sum(_terms(binding.delta) for binding in self.bindings) <= _FLOAT32_RANK
        large = math.prod(dims(self)) > _FLOAT32_ELEMENTS
        narrow = short and large and self.base.dtype != ir.DataType.DOUBLE
        return compute_dtype(self.dtype) if narrow else np.dtype(np.float64)

    def statistic(self, binding: Binding) -> Array | None:
        """What the delta's first pass over the weight found; computed once, when first asked for."""
        if type(binding.delta).prepare is Delta.prepare:
            return None  # a kind without a first pass
        with self._lock:
            if id(binding) not in self._statistics:
                self._statistics[id(binding)] = self._prepare(binding)
            return self._statistics[id(binding)]

    def _prepare(self, binding: Binding) -> Array | None:
        site, shape = binding.site, dims(self)
        axis, rows = site.layout.tiled_axis, block_rows(shape)
        length = site.layout.canonical_shape(shape)[axis] if shape else 1
        offset = site.layout.start if axis == 0 else 0
        replaced = _Folding(self, self.compute_dtype, site, replaces=True)
        with open_rows(self.base) as base, one_blas_thread():

            def read(start: int, stop: int) -> Array:
                """Canonical slab of the weight with replacements done and nothing else."""
                lo, hi = start + offset, stop + offset
                stored = np.empty((hi - lo, *shape[1:]) if shape else (), self.base.dtype.numpy())
                base.fill(lo, hi, stored)
                exact = stored.astype(self.compute_dtype)
                replaced.apply(exact, lo, hi)
                return _slab(exact, site, shape, lo, hi)[0]

            return _converted(binding.delta, self.compute_dtype).prepare(read, axis, length, rows)

    def check_finite(self, rounded: Array, lo: int, hi: int) -> None:
        """Raise NumericsError, naming the sites, when rows ``lo`` to ``hi`` did not stay finite."""
        if all_finite(rounded):
            return
        before = np.isfinite(read_rows(self.base, lo, hi).astype(np.float64))
        if not self.bindings and np.array_equal(before, np.isfinite(rounded)):
            return  # a mask of -inf that only changes its dtype
        names = ", ".join(sorted({binding.site.name for binding in self.bindings})) or str(self.name)
        raise NumericsError(
            f"folding {names}: the weight would hold inf or NaN in {self.dtype.name} "
            + ("(the base weight is finite)." if before.all() else "(the base weight itself already does)."),
            hint="The adapter is too strong for this dtype, or damaged: check its scale, or fold with --dtype fp32."
            if before.all()
            else "The base is damaged, or was saved after its training went wrong: fetch it again.",
        )


def _terms(delta: Delta) -> float:
    """How many products a delta sums per element of the weight; infinite where that is not what it does."""
    if delta.replaces:
        return 0
    return delta.rank if isinstance(delta, LowRank | StackedLowRank) else math.inf


def block_rows(shape: Sequence[int]) -> int:
    """How many stored rows are computed at once.

    A BLAS may round differently for another shape of the same product, so this depends on the tensor's shape only,
    whatever tiles the rows are read and written in: the same bytes come out for any of them.

    >>> block_rows((5632, 2048)), block_rows((2048, 5632)), block_rows((2048, 128256)), block_rows((7,)), block_rows(())
    (64, 23, 4, 131072, 131072)
    """
    row = max(math.prod(shape[1:]), 1)
    return max(min(max(_BLOCK_MIN_ROWS, _BLOCK_ELEMENTS // row), _BLOCK_MAX_ELEMENTS // row), 1)


class _FoldedRows(RowsBase):
    """A pass over a folded tensor: reads a tile of the base, folds it block by block where it lies."""

    def __init__(self, tensor: FoldedTensor, *, few: bool = False) -> None:
        self._tensor = tensor
        self._shape = dims(tensor)
        self._step = block_rows(self._shape)
        same = tensor.base.dtype == tensor.dtype
        sums, bindings = tensor.compute_dtype, tensor.bindings if same else ()
        self._products = products_of(bindings, self._shape, tensor.dtype.numpy(), sums)
        self._base = open_rows(tensor.base, few=few)

    def close(self) -> None:
        self._base.__exit__(None, None, None)

    @cached_property
    def _folding(self) -> _Folding:
        return _Folding(self._tensor, self._tensor.compute_dtype)

    @cached_property
    def _exact(self) -> Array:
        """Room for one block."""
        shape = (self._step, *self._shape[1:]) if self._shape else ()
        return np.empty(shape, self._tensor.compute_dtype)

    def fill(self, lo: int, hi: int, out: Array) -> None:
        if self._products is None or not self._fused(self._products, lo, hi, out):
            self._blocks(lo, hi, out)

    def _fused(self, products: list[Product], lo: int, hi: int, out: Array) -> bool:
        """By the kernel; False where something is not finite, which the other way explains."""
        self._base.fill(lo, hi, out)
        covered = sum(len(product.rows) * len(product.columns) for product in products) == math.prod(self._shape)
        finite = [product.add_to(out, lo) for product in products]
        return all(finite) and (covered or all_finite(out))

    def _blocks(self, lo: int, hi: int, out: Array) -> None:
        """By numpy, a block of rows at a time."""
        length = self._shape[0] if self._shape else 1
        first, last = lo // self._step * self._step, min(-(-hi // self._step) * self._step, length)
        aligned = (first, last) == (lo, hi)
        target = out if aligned else np.empty((last - first, *self._shape[1:]), out.dtype)
        base_dtype = self._tensor.base.dtype.numpy()
        stored = target if base_dtype == out.dtype else np.empty(target.shape, base_dtype)
        self._base.fill(first, last, stored)
        with one_blas_thread():
            for at in range(first, last, self._step):
                end = min(at + self._step, last)
                self._block(at, end, _cut(stored, at - first, end - first), _cut(target, at - first, end - first))
        if not aligned:
            out[...] = target[lo - first : hi - first]

    def _block(self, lo: int, hi: int, stored: Array, out: Array) -> None:
        exact = _cut(self._exact, 0, hi - lo)
        np.copyto(exact, stored, casting="unsafe")
        self._folding.apply(exact, lo, hi)
        round_to(exact, self._tensor.dtype, out)
        self._tensor.check_finite(out, lo, hi)


class _Folding:
    """The bindings of one tensor grouped by site, with their factors converted to the dtype they are computed in."""

    def __init__(
        self, tensor: FoldedTensor, dtype: np.dtype[np.generic], only: Site | None = None, *, replaces: bool = False
    ) -> None:
        """With ``only`` and ``replaces``: nothing but the replacements at that site."""
        self._tensor = tensor
        self._shape = dims(tensor)
        self._groups: list[tuple[Site, list[Delta], list[tuple[Binding, Delta]]]] = []
        for site in dict.fromkeys(binding.site for binding in tensor.bindings):
            if only is None or site == only:
                here = [(b, _converted(b.delta, dtype)) for b in tensor.bindings if b.site == site]
                first = [delta for _, delta in here if delta.replaces]
                rest = [] if replaces else [(b, delta) for b, delta in here if not delta.replaces]
                self._groups.append((site, first, rest))

    def apply(self, stored: Array, lo: int, hi: int) -> None:
        """Change the stored rows ``lo`` to ``hi``, in place."""
        for site, replacements, changes in self._groups:
            view, start, stop = _slab(stored, site, self._shape, lo, hi)
            if start < stop:
                axis = site.layout.tiled_axis
                for delta in replacements:
                    _assign(view, delta.apply_slab(view, axis, start, stop))
                self._change(view, axis, start, stop, changes)

    def _change(self, view: Array, axis: int, start: int, stop: int, changes: list[tuple[Binding, Delta]]) -> None:
        if len(changes) == 1 or all(delta.additive for _, delta in changes):
            for binding, delta in changes:
                _assign(view, delta.apply_slab(view, axis, start, stop, self._tensor.statistic(binding)))
            return
        original = view.copy()
        for binding, delta in changes:
            changed = delta.apply_slab(original.copy(), axis, start, stop, self._tensor.statistic(binding))
            view += changed - original


def _converted(delta: Delta, dtype: np.dtype[np.generic]) -> Delta:
    """The delta for many slabs; what it was made of need not stay in memory beside it.

    A kind that can only form ΔW whole forms it once, and not once for every slab.
    """
    converted = delta.converted(dtype)
    if converted is delta and delta.additive and type(delta).apply_slab is Delta.apply_slab:
        converted = Addition(delta.materialize(dtype))
    if converted is not delta:
        for array in delta.arrays().values():
            give_back(array)
    return converted


def _slab(stored: Array, site: Site, shape: Sequence[int], lo: int, hi: int) -> tuple[Array, int, int]:
    """The site's part of the stored rows ``lo:hi`` as a canonical view, and its range on the site's tiled axis."""
    layout = site.layout
    if layout.tiled_axis != 0 or layout.whole:
        return layout.view(stored), lo, hi
    # A block of the stored rows: the tile may hold some of it, or none.
    block_stop = shape[layout.perm[0] if layout.perm else 0] if layout.stop is None else layout.stop
    first, last = max(lo, layout.start), min(hi, block_stop)
    permuted = stored.transpose(layout.perm) if layout.perm else stored
    return permuted[max(first - lo, 0) : max(last - lo, 0)], first - layout.start, last - layout.start


def _cut(array: Array, lo: int, hi: int) -> Array:
    return array[lo:hi] if array.ndim else array


def _assign(view: Array, value: Array) -> None:
    """``view[...] = value``, without the copy where a delta worked in place."""
    if value is not view:
        view[...] = value
