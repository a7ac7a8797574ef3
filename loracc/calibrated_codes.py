"""A fold into a quantized weight whose codes were chosen: the codes lie in a scratch file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.calibrated import Gain
from loracc.dtypes import Array, round_to
from loracc.requantized import RequantizedTensor, Totals
from loracc.rows import ArrayRows, Rows
from loracc.tensors import dims, file_tensor, read_rows

__all__ = ["CalibratedCodes"]


class CalibratedCodes(RequantizedTensor):
    """A :class:`RequantizedTensor` whose codes are read from a file.

    Args:
        folded: The fold.
        codes: With the axes of the stored codes; written to ``path``.
        totals: What they lose.
        path: A scratch file; it must outlive the tensor's last use.
        gains: By site name.
    """

    def __init__(
        self, folded: RequantizedTensor, codes: Array, totals: Totals, path: Path, gains: dict[str, Gain]
    ) -> None:
        super().__init__(folded.decoded, folded.bindings, leader=folded.leader)
        self.gains = gains
        self._decision = replace(folded.settled, totals=totals)
        stored = codes.astype(np.int32)
        stored.tofile(path)
        self._codes = file_tensor(path, 0, stored.nbytes, ir.DataType.INT32, codes.shape, str(folded.name))

    @property
    def rounded(self) -> ir.TensorProtocol:
        """What the codes mean, as a plain tensor."""
        return ir.LazyTensor(
            lambda: ir.Tensor(self.numpy(), dtype=self.dtype), self.dtype, ir.Shape(dims(self)), name=self.name
        )

    def exact_codes_rows(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        for lo, hi in spans:
            yield lo, hi, read_rows(self._codes, lo, hi)

    def open_rows(self, *, few: bool = False) -> Rows:
        values = np.empty(self.weight.shape, self.dtype.numpy())
        for lo, hi, codes in self.exact_codes_rows(self.weight.spans()):
            values[lo:hi] = round_to(self.settled.grid.part(lo, hi).decode(codes), self.dtype)
        return ArrayRows(values.T if self.decoded.turned else values)
