"""The fold of an encoded weight: codes' = round((W + ΔW) / scale') + zero', block by block, and nothing else changes.

Each block of elements that share a scale

1. keeps its bytes, where no delta changes any of its elements;
2. else gets the scale and zero point that round-to-nearest gives for the new values
   (:class:`loracc.encodings.grid.Rule`), or keeps its old ones: whichever brings the codes nearer to W + ΔW. A grid
   that a better quantizer chose (HQQ, k-quants, GPTQ) thus stays while it serves, and no rule has to be guessed.

W is what the codes mean, or the weight that they were made from when that is known (``--base``). Everything is computed
in float64; the choice of grids needs one look at W + ΔW (two, where rows share scales), the codes another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from loracc.blas import one_blas_thread
from loracc.dtypes import Array, round_to
from loracc.encodings.decoded import DecodedTensor
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Grid, Rule
from loracc.errors import NumericsError, UnsupportedError
from loracc.folded import Binding, FoldedTensor
from loracc.rows import ArrayRows, Rows
from loracc.sites import Layout
from loracc.tensors import TiledTensor, dims

__all__ = ["CodesTensor", "RequantizedTensor", "Settled", "Totals", "followed", "turned_layout"]


@dataclass
class Totals:
    """Sums over a whole weight: ‖W‖², ‖ΔW‖², ‖(W' − W) − ΔW‖² and ⟨W' − W, ΔW⟩."""

    weight: float = 0.0
    change: float = 0.0
    lost: float = 0.0
    along: float = 0.0

    @property
    def survived(self) -> float | None:
        """How much of ΔW is in what changed: the projection of W' − W on it."""
        return self.along / self.change if self.change else None


@dataclass(frozen=True)
class Settled:
    """What the first passes decided: the new grid, and which blocks a delta changes."""

    grid: Grid
    touched: Array
    totals: Totals


class RequantizedTensor(FoldedTensor):
    """An initializer whose weight is encoded, with deltas folded in; its values are what the new codes mean.

    Args:
        base: The decoded weight.
        bindings: As for :class:`FoldedTensor`.
        dither: Round at random and not to nearest, seeded: what an independent rounding on the same grid would give.
        leader: The weight of the operator that this is the bias of. A runtime that computes in integers adds the codes
            of a bias to products of codes, so its scale is (scale of x) · (scale of W) and changes as that of W does.
    """

    def __init__(
        self,
        base: DecodedTensor,
        bindings: Sequence[Binding],
        dither: int | None = None,
        leader: RequantizedTensor | None = None,
    ) -> None:
        super().__init__(base, bindings)
        self.leader = leader
        self.decoded = base
        self.weight: EncodedWeight = base.weight
        self.dither = dither
        #: The fold in float64. The sites' layouts refer to the initializer, this one's to the codes.
        self.at_codes = FoldedTensor(base.exact(), [_at_codes(b, base) for b in self.bindings], ir.DataType.DOUBLE)
        self._decision: Settled | None = None
        self._deciding = threading.Lock()

    def open_rows(self, *, few: bool = False) -> Rows:
        grid = self.settled.grid
        values = np.empty(self.weight.shape, self.dtype.numpy())
        for lo, hi, exact in self.exact_spans(self.weight.spans()):
            values[lo:hi] = round_to(grid.part(lo, hi).decode(self.codes_of(exact, lo, hi)), self.dtype)
        return ArrayRows(values.T if self.decoded.turned else values)

    def compute_rows(self, lo: int, hi: int) -> Array:
        return np.ascontiguousarray(self.numpy()[lo:hi])

    @property
    def settled(self) -> Settled:
        """The decision on every block's grid; made when first asked for."""
        with self._deciding:
            if self._decision is None:
                with one_blas_thread():
                    self._decision = self._settle()
            return self._decision

    @property
    def totals(self) -> Totals:
        """What the fold did to the weight."""
        return self.settled.totals

    def parts(self) -> dict[str, ir.TensorProtocol]:
        """The tensors that take the places of the codes, the scales and (where there are any) the zero points."""
        made: dict[str, ir.TensorProtocol] = {"codes": CodesTensor(self), "scales": _GridTensor(self, "scales")}
        if self.weight.zeros is not None:
            made["zeros"] = _GridTensor(self, "zeros")
        return made

    def pinned(self, reason: str) -> RequantizedTensor:
        """The same fold with the scales and zero points that there are."""
        base = self.decoded.with_weight(self.weight.with_pin(reason))
        return RequantizedTensor(base, self.bindings, self.dither)

    def exact_codes_rows(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        """``(lo, hi, codes)`` of runs of rows that begin at blocks."""
        for lo, hi, exact in self.exact_spans(spans):
            yield lo, hi, self.codes_of(exact, lo, hi)

    def codes_of(self, exact: Array, lo: int, hi: int) -> Array:
        """The codes for W + ΔW of rows ``lo`` to ``hi``, ``lo`` at the begin of a block."""
        settled, old = self.settled, self.weight.read_codes(lo, hi)
        grid = settled.grid.part(lo, hi)
        codes = grid.nearest(exact) if self.dither is None else self._dithered(grid, exact, lo)
        touched = self.weight.blocks.expand(settled.touched[self.weight.blocks.rows(lo, hi)], hi - lo)
        return np.where(touched & ~np.isnan(codes), codes, old).astype(np.int32)

    def _dithered(self, grid: Grid, exact: Array, lo: int) -> Array:
        noise = np.random.default_rng([self.dither or 0, lo]).random(exact.shape)
        codes: Array = np.clip(np.floor(grid.position(exact) + noise), grid.low, grid.high)
        return codes

    def exact_spans(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        """W + ΔW in float64."""
        with self.at_codes.open_rows() as rows:
            for lo, hi in spans:
                exact = np.empty((hi - lo, *self.weight.shape[1:]))
                rows.fill(lo, hi, exact)
                yield lo, hi, exact

    def _pairs(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Array, Array]]:
        """(W, W + ΔW) in float64; the same at every run, if not to the last bit what :meth:`exact_spans` gives."""
        for (lo, hi), (original, exact, _) in zip(spans, self.at_codes.probe(spans), strict=True):
            yield lo, hi, original, exact

    # ------------------------------------------------------------------------------------------------ choice of grids

    def _settle(self) -> Settled:
        old, spans = self.weight.grid(), self.weight.spans()
        choice = _Choice(self.weight, old)
        # Rows that share no scale are looked at once, any others twice: W + ΔW is not held.
        for band in [[span] for span in spans] if self.weight.blocks.by_rows else [spans]:
            held = list(self._pairs(band)) if len(band) == 1 else None
            for pair in held or self._pairs(band):
                choice.look(*pair)
            new = self._new_grid(choice, old.part(band[0][0], band[-1][1]), band)
            for pair in held or self._pairs(band):
                choice.weigh(new, *pair)
        return choice.settled()

    def _new_grid(self, choice: _Choice, old: Grid, band: Sequence[tuple[int, int]]) -> Grid:
        """The other grid that rows may get; their old one where there is none."""
        rows = self.weight.blocks.rows(band[0][0], band[-1][1])
        if self.leader is not None:
            new = followed(old, self.leader.weight.grid(), self.leader.settled.grid, self.weight.scales.dtype)
            choice.forced = True
            choice.touched |= new.scales != old.scales
            return new
        if self.weight.pinned or not choice.touched[rows].any():
            return old
        return self._rule.fit(choice.least[rows], choice.most[rows], old)

    @cached_property
    def _rule(self) -> Rule:
        return self.weight.rule()

    def check_base(self) -> None:
        """Look at the scales and zero points that there are.

        Raises:
            NumericsError: Some are inf or NaN.
        """
        grid = self.weight.grid()
        if not (np.isfinite(grid.scales).all() and np.isfinite(grid.zeros).all()):
            names = ", ".join(dict.fromkeys(binding.site.name for binding in self.bindings))
            raise NumericsError(
                f"{names}: the quantized weight {self.weight.name!r} has scales or zero points that are inf or NaN.",
                hint="The model is damaged, or was quantized from weights that were: quantize it again.",
            )


class _Choice:
    """Rules 1 and 2: the grids of a weight's blocks, from looks at all of W and W + ΔW."""

    def __init__(self, weight: EncodedWeight, old: Grid) -> None:
        shape = old.scales.shape
        self.blocks, self.old, self.totals = weight.blocks, old, Totals()
        self.touched = np.zeros(shape, bool)
        self.least, self.most = np.full(shape, np.inf), np.full(shape, -np.inf)
        self.scales, self.zeros = old.scales.copy(), old.zeros.copy()
        #: Per block, for the old grid and the new one: squared distance to W + ΔW, and ⟨W' − W, ΔW⟩.
        self.lost, self.along = np.zeros((2, *shape)), np.zeros((2, *shape))
        self.forced = False

    def look(self, lo: int, hi: int, original: Array, exact: Array) -> None:
        """First look: what changes, and the extremes."""
        rows, blocks = self.blocks.rows(lo, hi), self.blocks
        self.touched[rows] |= blocks.reduce(np.logical_or, exact != original)
        self.least[rows] = np.minimum(self.least[rows], blocks.reduce(np.minimum, exact))
        self.most[rows] = np.maximum(self.most[rows], blocks.reduce(np.maximum, exact))

    def weigh(self, new: Grid, lo: int, hi: int, original: Array, exact: Array) -> None:
        """Second look: what each grid loses. ``new`` is that of the rows, or of a weight whose rows share scales."""
        rows, change = self.blocks.rows(lo, hi), exact - original
        self.totals.weight += float(np.vdot(original, original))
        self.totals.change += float(np.vdot(change, change))
        for index, grid in enumerate((self.old.part(lo, hi), new)):
            codes = grid.nearest(exact)
            off = grid.decode(codes)
            np.copyto(off, original, where=np.isnan(codes))
            off -= exact
            lost = self.blocks.reduce(np.add, np.square(off))
            self.lost[index][rows] += lost
            # ⟨W' − W, ΔW⟩ = ⟨W' − (W + ΔW), ΔW⟩ + ‖ΔW‖²
            off *= change
            off += np.square(change)
            self.along[index][rows] += self.blocks.reduce(np.add, off)
        self.scales[rows], self.zeros[rows] = new.scales, new.zeros

    def settled(self) -> Settled:
        """The better of the two grids for each block that changes."""
        better = self.touched & ((self.lost[1] < self.lost[0]) | self.forced)
        scales, zeros = np.where(better, self.scales, self.old.scales), np.where(better, self.zeros, self.old.zeros)
        lost, along = np.where(better, self.lost[1], self.lost[0]), np.where(better, self.along[1], self.along[0])
        self.totals.lost, self.totals.along = float(lost[self.touched].sum()), float(along[self.touched].sum())
        return Settled(replace(self.old, scales=scales, zeros=zeros), self.touched, self.totals)


class CodesTensor(TiledTensor):
    """The new codes as they are stored. Types of fewer than eight bits are made whole."""

    def __init__(self, source: RequantizedTensor) -> None:
        stored = source.weight.codes
        self.source = source
        if stored.dtype.bitwidth >= 8:
            super().__init__(stored.dtype, dims(stored), stored.name)
        else:  # rows of these are no whole bytes
            ir.LazyTensor.__init__(self, self._small, stored.dtype, ir.Shape(dims(stored)), name=stored.name)

    def _small(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    def numpy(self) -> Array:
        return self.compute_rows(0, self.source.weight.shape[0])

    def tobytes(self) -> bytes:
        return ir.Tensor(self.numpy(), dtype=self.dtype).tobytes()

    def compute_rows(self, lo: int, hi: int) -> Array:
        weight, blocks = self.source.weight, self.source.weight.blocks
        first = lo // blocks.row_step * blocks.row_step
        last = min(-(-hi // blocks.row_step) * blocks.row_step, weight.shape[0])
        result = np.empty((last - first, *dims(self)[1:]), self.dtype.numpy())
        spans = [(max(a, first), min(b, last)) for a, b in weight.spans() if b > first and a < last]
        for start, stop, codes in self.source.exact_codes_rows(spans):
            result[start - first : stop - first] = weight.pack_codes(codes, start, stop)
        return result[lo - first : hi - first]


class _GridTensor(ir.LazyTensor):
    """The new scales or zero points as they are stored."""

    def __init__(self, source: RequantizedTensor, part: str) -> None:
        stored = source.weight.scales if part == "scales" else source.weight.zeros
        assert stored is not None
        pack = source.weight.pack_scales if part == "scales" else source.weight.pack_zeros

        def made() -> ir.TensorProtocol:
            return ir.Tensor(pack(source.settled.grid), dtype=stored.dtype, name=stored.name)

        super().__init__(made, stored.dtype, ir.Shape(dims(stored)), name=stored.name)

    def __repr__(self) -> str:
        return f"_GridTensor<{self.dtype},{self.shape}>(name={self.name!r})"


def followed(bias: Grid, before: Grid, after: Grid, dtype: ir.DataType) -> Grid:
    """A bias's grid once the scales of its operator's weight have changed: changed by the same factors.

    Raises:
        UnsupportedError: The weight has another scale for each of several blocks of one output.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(before.scales == after.scales, 1.0, after.scales / before.scales).ravel()
    if factors.size not in (1, bias.blocks.shape[0]):
        raise UnsupportedError(
            f"a bias of {bias.blocks.shape[0]} integers cannot follow a weight of {factors.size} scales.",
            hint="Fold into the float model and quantize the result.",
        )
    scales = np.broadcast_to(bias.scales * factors, max(bias.scales.shape, factors.shape, key=len))
    if scales.size != bias.scales.size:
        scales = scales.max(keepdims=True)
    return replace(bias, scales=round_to(scales.reshape(bias.scales.shape), dtype).astype(np.float64))


def turned_layout(layout: Layout) -> Layout:
    """A layout of a matrix as one of its transpose."""
    canonical = layout.perm or (0, 1)
    perm = tuple(1 - axis for axis in canonical)
    return replace(layout, perm=() if perm == (0, 1) else perm)


def _at_codes(binding: Binding, base: DecodedTensor) -> Binding:
    if not base.turned:
        return binding
    return replace(binding, site=replace(binding.site, layout=turned_layout(binding.site.layout)))
