"""One weight as a graph stores it: codes, scales, zero points, and how the codes lie in their tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, is_float, round_to
from loracc.encodings.grid import Blocks, Grid, Rule, used_range
from loracc.encodings.packing import pack, unpack
from loracc.tensors import dims, read_rows, tile_rows

__all__ = ["EncodedWeight"]

#: Of some rows in float64: what is computed with them stays in a core's cache.
_TILE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class EncodedWeight:
    """Codes with their scales. The weight has the axes that the codes have: MatMulNBits' is ``[N, K]``.

    Attributes:
        name: What the graph calls the codes.
        op_type: The operator that decodes them.
        codes: Integers of the weight's shape, or, when packed, uint8 ``[N, bytes]`` or ``[N, blocks, bytes]``.
        scales: Float; as many as :attr:`Blocks.grid` says, in that order and of any shape.
        zeros: Integers (packed like the codes, row by row) or floats; None for ``default_zero``.
        blocks: Which elements share a scale.
        bits: Of one code.
        packed: Whether codes share bytes of a uint8 tensor.
        default_zero: The zero point where ``zeros`` is None.
        pinned: Why scales and zero points must stay as they are; "" when they need not.
    """

    name: str
    op_type: str
    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    blocks: Blocks
    bits: int
    packed: bool = False
    default_zero: int = 0
    pinned: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.blocks.shape

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code there is."""
        signed = not self.packed and self.codes.dtype.is_signed()
        return (-(1 << self.bits - 1), (1 << self.bits - 1) - 1) if signed else (0, (1 << self.bits) - 1)

    def describe(self) -> str:
        """The encoding in a few words.

        >>> shape = ir.tensor(np.zeros((4, 8), np.int8))
        >>> EncodedWeight("w", "DequantizeLinear", shape, shape, None, Blocks((4, 8), 1), 8).describe()
        'DequantizeLinear INT8, a scale for each index of axis 1'
        """
        blocks, kind = self.blocks, f"{self.bits} bit" if self.packed else self.codes.dtype.name
        if blocks.axis is None:
            sharing = "one scale"
        elif blocks.block:
            sharing = f"blocks of {blocks.block} along axis {blocks.axis}"
        else:
            sharing = f"a scale for each index of axis {blocks.axis}"
        return f"{self.op_type} {kind}, {sharing}{', zero points' if self.zeros is not None else ''}"

    def same_scheme(self, other: EncodedWeight) -> str:
        """What the other encoding has different, "" when nothing: tensors' types and shapes, blocks, bits."""
        for what, mine, theirs in (
            ("operator", self.op_type, other.op_type),
            ("blocks", self.blocks, other.blocks),
            ("bits", self.bits, other.bits),
            *((part, _outline(getattr(self, part)), _outline(getattr(other, part))) for part in _PARTS),
        ):
            if mine != theirs:
                return f"{what} of the quantized weight: {theirs} in the output, {mine} in the base"
        return ""

    def read_codes(self, lo: int, hi: int) -> Array:
        """The codes of rows ``lo`` to ``hi`` as int32 ``[hi - lo, *shape[1:]]``."""
        stored = read_rows(self.codes, lo, hi)
        if not self.packed:
            return np.asarray(stored).astype(np.int32)
        flat = stored.reshape(hi - lo, -1) if len(self.shape) == 2 else stored
        return unpack(flat, self.bits)[..., : self.shape[-1]].astype(np.int32)

    def pack_codes(self, codes: Array, lo: int, hi: int) -> Array:
        """The stored form of rows ``lo`` to ``hi``; what pads a last block keeps its bytes."""
        if not self.packed:
            return codes.astype(self.codes.dtype.numpy())
        shape = (hi - lo, *dims(self.codes)[1:])
        whole = unpack(read_rows(self.codes, lo, hi).reshape(*codes.shape[:-1], -1), self.bits).copy()
        whole[..., : self.shape[-1]] = codes
        return pack(whole, self.bits).reshape(shape)

    def grid(self) -> Grid:
        """Scales and zero points, whole."""
        shape = self.blocks.grid
        scales = np.asarray(self.scales.numpy()).astype(np.float64).reshape(shape)
        low, high = self.code_range
        return Grid(self.blocks, scales, self._zeros(shape), low, high)

    def _zeros(self, shape: tuple[int, ...]) -> Array:
        if self.zeros is None:
            return np.full(shape, float(self.default_zero))
        stored = np.asarray(self.zeros.numpy())
        if self.packed and not is_float(self.zeros.dtype):
            stored = unpack(stored.reshape(*shape[:-1], -1), self.bits)[..., : shape[-1]]
        return stored.astype(np.float64).reshape(shape)

    def pack_scales(self, grid: Grid) -> Array:
        """The scales as they are stored; they have been rounded to that type before."""
        return round_to(grid.scales, self.scales.dtype).reshape(dims(self.scales))

    def pack_zeros(self, grid: Grid) -> Array:
        """The zero points as they are stored."""
        assert self.zeros is not None
        shape = dims(self.zeros)
        if is_float(self.zeros.dtype):
            return round_to(grid.zeros, self.zeros.dtype).reshape(shape)
        if not self.packed:
            return grid.zeros.reshape(shape).astype(np.int32).astype(self.zeros.dtype.numpy())
        count = grid.zeros.shape[-1]
        old = np.asarray(self.zeros.numpy()).reshape(*grid.zeros.shape[:-1], -1)
        whole = unpack(old, self.bits).copy()
        whole[..., :count] = grid.zeros
        return pack(whole, self.bits).reshape(shape)

    def rule(self) -> Rule:
        """How new scales are chosen (see :class:`Rule`); reads the codes of an eight-bit weight once."""
        grid = self.grid()
        low, high = self.code_range
        middle = (low + high + 1) // 2
        symmetric = bool((grid.zeros == (middle if self.zeros is not None else self.default_zero)).all())
        if not self.packed and self.bits in (4, 8, 16):
            used = [self._extremes(lo, hi) for lo, hi in self.spans()]
            zero = round(float(grid.zeros.flat[0])) if symmetric else middle
            low, high = used_range(low, high, min(u[0] for u in used), max(u[1] for u in used), zero)
        zero_dtype = self.zeros.dtype if self.zeros is not None and is_float(self.zeros.dtype) else None
        return Rule(low, high, symmetric, bool((grid.scales < 0).any()), self.scales.dtype, zero_dtype)

    def _extremes(self, lo: int, hi: int) -> tuple[int, int]:
        codes = self.read_codes(lo, hi)
        return int(codes.min()), int(codes.max())

    def spans(self) -> list[tuple[int, int]]:
        """Runs of rows that cut no block of scales in two."""
        step = tile_rows(self.shape, 8, _TILE_BYTES) // self.blocks.row_step * self.blocks.row_step
        step = max(step, self.blocks.row_step)
        return [(lo, min(lo + step, self.shape[0])) for lo in range(0, self.shape[0], step)]

    def decode_rows(self, lo: int, hi: int, grid: Grid) -> Array:
        """Rows in float64, exactly; ``lo`` begins a block and ``grid`` is the whole one."""
        return grid.part(lo, hi).decode(self.read_codes(lo, hi))

    def with_pin(self, reason: str) -> EncodedWeight:
        """The same with scales that must stay."""
        return replace(self, pinned=reason)


_PARTS = ("codes", "scales", "zeros")


def _outline(tensor: ir.TensorProtocol | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype.name}{list(dims(tensor))}"
