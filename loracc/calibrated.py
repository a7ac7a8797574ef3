"""A fold whose rounding was chosen: the values lie in a scratch file, and everything else is the fold's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from loracc.dtypes import Array, all_finite
from loracc.errors import NumericsError
from loracc.folded import FoldedTensor
from loracc.rows import FileRows, Rows
from loracc.tensors import dims, file_tensor, read_rows

__all__ = ["CalibratedTensor", "Gain"]


@dataclass(frozen=True)
class Gain:
    """What calibrated rounding did for one site.

    Attributes:
        nearest: Root mean square error of the site's outputs on held-out inputs, or of the residual stream that they
            are added to, relative to the outputs' own root mean square, with every element rounded to nearest. What
            earlier layers left is in it.
        calibrated: The same with the rounding that was chosen by calibration.
        used: Whether the calibrated one is in the output; the better of the two is.
    """

    nearest: float
    calibrated: float
    used: bool


class CalibratedTensor(FoldedTensor):
    """A :class:`FoldedTensor` whose rounded values were chosen beforehand and are read from a file.

    Args:
        folded: The fold.
        rounded: The values, in the stored layout and the fold's dtype; written to ``path``.
        path: A scratch file; it must outlive the tensor's last use.
        gains: By site name.

    Attributes:
        rounded: The values.

    Raises:
        NumericsError: A value is not finite.
    """

    def __init__(self, folded: FoldedTensor, rounded: Array, path: Path, gains: dict[str, Gain]) -> None:
        super().__init__(folded.base, folded.bindings, folded.dtype)
        if not all_finite(rounded):
            raise NumericsError(f"{folded.name}: calibrated rounding gives inf or NaN in {folded.dtype.name}.")
        self.gains = gains
        rounded.tofile(path)
        self.rounded: ir.ExternalTensor = file_tensor(
            path, 0, rounded.nbytes, folded.dtype, dims(folded), str(folded.name)
        )

    def open_rows(self, *, few: bool = False) -> Rows:
        return FileRows(self.rounded.path, 0, self.rounded.name)

    def probe(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[Array, Array, Array]]:
        spans = list(spans)
        for (lo, hi), (original, exact, _) in zip(spans, super().probe(spans), strict=True):
            yield original, exact, read_rows(self.rounded, lo, hi)
