"""Which rows of a value belong to which row of the batch: what a branch must know that differs from row to row.

The batch is axis 0 of the model's inputs. A value follows it in one of two ways, and a branch can be built for both:

    leading    axis 0 is the batch: [batch, ..., features]
    flattened  axis 0 is the batch and all axes behind it, batch first: [batch·rows, features], as a Reshape made it

Both are proved by the dimensions (:mod:`loracc.passes.value_dims`), walking back through operators that leave the rows
where they are. What cannot be proved is refused: so is a batch of fixed size that is another axis' length too, as two
equal numbers prove nothing (a batch of one is told from nothing, and need not be).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.passes.constant_values import Constants
from loracc.passes.value_dims import Dims

__all__ = ["BatchRows", "Rows"]

#: Operators whose result has the rows of their first input that is not constant.
_KEEP_ROWS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "Cast", "Identity", "Dropout", "Neg", "Abs", "Clip"}
    | {
        "Relu",
        "Gelu",
        "Tanh",
        "Sigmoid",
        "Erf",
        "Sqrt",
        "Exp",
        "Reciprocal",
        "Softmax",
        "HardSwish",
        "LeakyRelu",
        "Elu",
    }
    | {"FastGelu", "BiasGelu", "QuickGelu", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
    | {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
#: Products keep the rows of their first input.
_PRODUCTS = frozenset({"Gemm", "MatMul"})
_MOST_STEPS = 64


@dataclass(frozen=True)
class Rows:
    """How a value follows the batch.

    Attributes:
        source: A graph input whose axis 0 is that batch.
        axes: Axes of the value; a flattened one has two.
        flattened: Axis 0 is more than the batch.
    """

    source: ir.Value
    axes: int
    flattened: bool


class BatchRows:
    """Finds the rows of a graph's values.

    Args:
        model: The graph, without branches.
    """

    def __init__(self, model: ir.Model) -> None:
        self.dims = Dims(Constants(model.graph.opset_imports.get("", 1)), model)
        self.batches: dict[Hashable, ir.Value] = {}
        fed = [v for v in model.graph.inputs if v.name not in model.graph.initializers and v.shape is not None]
        for value in fed:
            found = self.dims.of(value)
            if found and not _batch_is_behind(found):
                self.batches.setdefault(found[0], value)
        elsewhere = self._lengths_of_other_axes(model)
        self.ambiguous = [n for n in self.batches if isinstance(n, int) and n > 1 and n in elsewhere]
        for number in self.ambiguous:
            del self.batches[number]

    def of(self, value: ir.Value, where: str) -> Rows:
        """How ``value`` follows the batch.

        Raises:
            UnsupportedError: It cannot be told.
        """
        axes = self.dims.rank(value)
        current: ir.Value | None = value
        for _ in range(_MOST_STEPS):
            if current is None:
                break
            found = self.dims.of(current)
            if found and found[0] in self.batches and axes is not None:
                if len(found) == axes:
                    return Rows(self.batches[found[0]], axes, flattened=False)
                break
            flat = self._before_flattening(current)
            if flat is not None:
                return Rows(self.batches[flat], 2, flattened=True)
            current = self._same_rows(current)
        shape = self.dims.of(value)
        why = f" (the batch of {self.ambiguous[0]} is the length of another axis too)" if self.ambiguous else ""
        raise UnsupportedError(
            f"{where}: which rows of its input {value.name!r} (shape {_told(shape)}) belong to which row of the batch "
            f"cannot be told{why}.",
            hint="Export the model with a dynamic batch as axis 0 of its inputs, or attach as inputs: one adapter for "
            "all rows of a call.",
        )

    def _lengths_of_other_axes(self, model: ir.Model) -> set[Hashable]:
        """Every length behind axis 0, of any value; nothing is looked at where no batch has a fixed size."""
        if not any(isinstance(number, int) and number > 1 for number in self.batches):
            return set()
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        return {length for value in values for length in (self.dims.of(value) or ())[1:]}

    def _before_flattening(self, value: ir.Value) -> Hashable | None:
        """The batch of what a Reshape made [rows, features] of: it was axis 0; the last axes are the features now."""
        node = value.producer()
        if node is None or node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
            return None
        before, after = self.dims.of(node.inputs[0]), self.dims.of(value)
        if before is None or after is None or len(after) != 2 or len(before) < 3 or before[0] not in self.batches:
            return None
        tails = [before[axis:] for axis in range(1, len(before))]
        return before[0] if any(_length(tail) == after[-1] for tail in tails) else None

    def _same_rows(self, value: ir.Value) -> ir.Value | None:
        """An operand of ``value``'s producer that has its rows, or None."""
        node = value.producer()
        if node is None or node.outputs[0] is not value:
            return None
        if node.op_type in _PRODUCTS:
            return None if node.attributes.get_int("transA", 0) == 1 else node.inputs[0]
        if node.op_type not in _KEEP_ROWS:
            return None
        axes = self.dims.rank(value)
        for given in node.inputs:
            if given is None or self.dims.constants.is_constant(given):
                continue
            if self.dims.rank(given) == axes:
                return given
        return None


def _batch_is_behind(dims: tuple[Hashable, ...]) -> bool:
    """Whether an input's own names say that its batch is another axis than the first: [sequence, batch, ...]."""
    named = ["batch" in _dim(dim).lower() for dim in dims]
    return any(named) and not named[0]


def _length(dims: tuple[Hashable, ...]) -> Hashable:
    """How many elements: a number, the one dimension itself, or None."""
    if len(dims) == 1:
        return dims[0]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(dims) else None


def _told(shape: tuple[Hashable, ...] | None) -> str:
    if shape is None:
        return "unknown"
    return f"[{', '.join(_dim(dim) for dim in shape)}]"


def _dim(dim: Hashable) -> str:
    if isinstance(dim, tuple):
        return str(dim[1]) if dim[0] == "symbol" else "?"
    return str(dim)
