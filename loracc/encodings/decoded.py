"""An encoded weight as the float tensor it means: what a graph's initializer holds while deltas are bound to it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loracc.concatenated import ConcatenatedTensor
from loracc.dtypes import Array, round_to
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Grid
from loracc.rows import ArrayRows, Rows, RowsBase
from loracc.tensors import PermutedTensor, TiledTensor, dims, open_rows, read_rows

__all__ = ["DecodedTensor", "ExactTensor"]


class DecodedTensor(TiledTensor):
    """The values of an encoded weight, in the type that the decoding operator gives.

    Args:
        weight: Codes and scales.
        name: The initializer's.
        turned: The graph reads the transpose of the weight (MatMulNBits stores ``[N, K]`` for ``x · W[K, N]``).
        dtype: Of the values.
        original: The weight before it was quantized, of this tensor's shape: deltas are added to it, and not to what
            the codes mean. Where no delta changes a block, its codes stay.
    """

    def __init__(
        self,
        weight: EncodedWeight,
        name: str,
        dtype: ir.DataType,
        *,
        turned: bool = False,
        original: ir.TensorProtocol | None = None,
        origin: object = None,
    ) -> None:
        super().__init__(dtype, weight.shape[::-1] if turned else weight.shape, name)
        self.origin = origin
        self.weight = weight
        self.turned = turned
        self.original = original

    def renamed(self, name: str) -> DecodedTensor:
        """The same values under another name."""
        return self._copy(name, self.original)

    def with_original(self, original: ir.TensorProtocol) -> DecodedTensor:
        """The same codes, and the weight that they were made from."""
        if dims(original) != dims(self):
            raise ValueError(f"{self.name}: the original is {list(dims(original))}, the weight {list(dims(self))}")
        return self._copy(str(self.name), original)

    def with_weight(self, weight: EncodedWeight) -> DecodedTensor:
        """Another encoding of a weight of this shape."""
        return DecodedTensor(
            weight, str(self.name), self.dtype, turned=self.turned, original=self.original, origin=self.origin
        )

    def _copy(self, name: str, original: ir.TensorProtocol | None) -> DecodedTensor:
        return DecodedTensor(self.weight, name, self.dtype, turned=self.turned, original=original, origin=self.origin)

    def exact(self) -> ExactTensor:
        """The values in float64, with the axes of the codes."""
        original = self.original
        return ExactTensor(self.weight, _transposed(original) if original is not None and self.turned else original)

    def step(self) -> float:
        """The largest distance of neighbouring values."""
        return float(np.abs(self.weight.grid().scales).max(initial=0.0))

    def open_rows(self, *, few: bool = False) -> Rows:
        if self.turned:
            exact = self.exact().numpy()
            return ArrayRows(round_to(exact, self.dtype).T)
        return super().open_rows(few=few)

    def compute_rows(self, lo: int, hi: int) -> Array:
        if self.turned:
            return np.ascontiguousarray(self.numpy()[lo:hi])
        return round_to(read_rows(self.exact(), lo, hi), self.dtype)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The transpose, with rows that are read where they lie if those of the tensor are a transpose themselves."""
    if isinstance(tensor, PermutedTensor) and tensor.perm == (1, 0):
        return tensor.base
    if isinstance(tensor, ConcatenatedTensor):
        return ConcatenatedTensor([_transposed(part) for part in tensor.parts], 1 - tensor.axis, str(tensor.name))
    return PermutedTensor(tensor, (1, 0))


class ExactTensor(TiledTensor):
    """An encoded weight's values in float64, or its original's; with the axes of the codes."""

    def __init__(self, weight: EncodedWeight, original: ir.TensorProtocol | None = None) -> None:
        super().__init__(ir.DataType.DOUBLE, weight.shape, weight.name)
        self.weight = weight
        self.original = original
        self._grid: Grid | None = None

    def compute_rows(self, lo: int, hi: int) -> Array:
        if self.original is not None:
            return read_rows(self.original, lo, hi).astype(np.float64)
        if self._grid is None:
            self._grid = self.weight.grid()
        step = self.weight.blocks.row_step
        first = lo // step * step
        return self.weight.decode_rows(first, hi, self._grid)[lo - first :]

    def open_rows(self, *, few: bool = False) -> Rows:
        return _OriginalRows(self.original, few=few) if self.original is not None else super().open_rows(few=few)


class _OriginalRows(RowsBase):
    """A pass over the original's rows that gives them in float64."""

    def __init__(self, original: ir.TensorProtocol, *, few: bool) -> None:
        self._shape, self._dtype = dims(original), original.dtype.numpy()
        self._rows = open_rows(original, few=few)

    def fill(self, lo: int, hi: int, out: Array) -> None:
        own = np.empty((hi - lo, *self._shape[1:]), self._dtype)
        self._rows.fill(lo, hi, own)
        out[...] = own

    def close(self) -> None:
        self._rows.__exit__(None, None, None)
