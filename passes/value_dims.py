"""What is known of a value's dimensions, symbolically: enough to prove that two reshaped rows are the same rows.

A dimension is an int, or any other hashable thing that equals itself: a symbol that the graph names, or "axis i of that
value". Exporters compute the target of a Reshape from the input's own shape (``Concat(Shape(x)[0], -1, 768)``); this
module follows such computations, and claims nothing that it cannot follow.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from loracc.passes.constant_values import Constants, is_onnx
from loracc.quiet import quiet

__all__ = ["Dims"]

_SAME_SHAPE = frozenset({"Cast", "Identity", "Dropout", "Relu", "Gelu", "Tanh", "Neg", "LayerNormalization"})
_BROADCASTS = frozenset({"Add", "Sub", "Mul", "Div"})
_VECTOR_STEPS = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze"})


class Dims:
    """Dimensions of a graph's values.

    Args:
        constants: What is constant.
        model: Where a graph does not say its shapes, ONNX's inference is asked, on a copy.
    """

    def __init__(self, constants: Constants, model: ir.Model | None = None) -> None:
        self.constants = constants
        self._model = model
        self._inferred: dict[str, tuple[Hashable, ...]] | None = None
        self._known: dict[ir.Value, tuple[Hashable, ...] | None] = {}

    def of(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        """The value's dimensions, None when not even their number is known."""
        if value not in self._known:
            self._known[value] = None  # a cycle cannot be, but a deep graph can: what is being asked is not known
            self._known[value] = self._find(value)
        return self._known[value]

    def rank(self, value: ir.Value) -> int | None:
        """The number of dimensions, None when unknown."""
        found = self.of(value)
        return None if found is None else len(found)

    def _find(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        written = _annotated(value) or self._infer(value)
        if written is not None and None not in written:
            return written
        computed = self._computed(value)
        if written is None or (computed is not None and len(computed) != len(written)):
            return computed
        both = zip(written, computed or (None,) * len(written), strict=True)
        return tuple(next((d for d in pair if d is not None), ("axis", id(value), i)) for i, pair in enumerate(both))

    def _infer(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        if self._model is None or value.producer() is None:
            return None
        if self._inferred is None:
            copy = self._model.clone()
            with quiet("onnx_ir"):
                ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
            shapes = {str(v.name): _annotated(v) for node in copy.graph for v in node.outputs}
            self._inferred = {name: shape for name, shape in shapes.items() if shape is not None}
        return self._inferred.get(str(value.name))

    def _computed(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        node = value.producer()
        if node is None or not is_onnx(node) or not node.inputs or node.inputs[0] is None:
            return None
        first = node.inputs[0]
        if node.op_type in _SAME_SHAPE:
            return self.of(first) if value is node.outputs[0] else None
        if node.op_type in _BROADCASTS:
            return self._broadcast(node)
        if node.op_type == "Reshape":
            return self._reshaped(value, node)
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            left, right = self._matrix(first), self._matrix(node.inputs[1])
            if left is not None and right is not None and len(left) >= 2 and len(right) >= 2:
                batch = left[:-2] if len(left) >= len(right) else right[:-2]
                return (*batch, left[-2], right[-1]) if min(len(left), len(right)) == 2 else None
            return None
        if node.op_type == "Transpose":
            before, perm = self.of(first), node.attributes.get("perm")
            if before is None:
                return None
            return before[::-1] if perm is None else tuple(before[axis] for axis in perm.as_ints())
        if node.op_type in ("Gemm", "Conv"):
            weight = node.inputs[1]
            rank = 2 if node.op_type == "Gemm" else self.rank(weight) if weight is not None else None
            return None if rank is None else tuple(("axis", id(value), i) for i in range(rank))
        if node.op_type == "Gather" and self.constants.is_constant(first):
            ids = self.of(node.inputs[1]) if node.inputs[1] is not None else None
            table = self.constants.shape(first)
            looked_up = len(table) == 2 and not node.attributes.get_int("axis", 0)
            return (*ids, table[1]) if ids is not None and looked_up else None
        return None

    def _matrix(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        return self.constants.shape(value) if self.constants.is_constant(value) else self.of(value)

    def _broadcast(self, node: ir.Node) -> tuple[Hashable, ...] | None:
        """With a constant of no more axes: its own lengths where they are not one, else the other operand's."""
        a, b = node.inputs[0], node.inputs[1]
        assert a is not None and b is not None
        for one, other in ((a, b), (b, a)):
            found = self.of(one)
            if found is not None and self.constants.is_constant(other):
                shape = self.constants.shape(other)
                if len(shape) > len(found):
                    return None
                padded = (1,) * (len(found) - len(shape)) + shape
                return tuple(mine if own == 1 else own for mine, own in zip(found, padded, strict=True))
        return None

    def _reshaped(self, value: ir.Value, node: ir.Node) -> tuple[Hashable, ...] | None:
        target = self.vector(node.inputs[1]) if node.inputs[1] is not None else None
        if target is None or node.inputs[0] is None:
            return None
        before = self.of(node.inputs[0])
        allowzero = node.attributes.get_int("allowzero", 0)
        result: list[Hashable] = []
        for axis, dim in enumerate(target):
            if dim == -1:
                result.append(("axis", id(value), axis))
            elif dim == 0 and not allowzero:
                result.append(before[axis] if before is not None and axis < len(before) else ("axis", id(value), axis))
            else:
                result.append(dim)
        return tuple(result)

    def vector(self, value: ir.Value) -> tuple[Hashable, ...] | None:
        """The elements of a value that holds dimensions (a scalar counts as one element)."""
        if self.constants.is_constant(value):
            return tuple(int(n) for n in self.constants.evaluate(value).reshape(-1))
        node = value.producer()
        if node is None or not is_onnx(node) or any(v is None for v in node.inputs):
            return None
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Shape":
            found = self.of(inputs[0])
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            return None if found is None else found[start:end]
        if node.op_type in _VECTOR_STEPS or (node.op_type == "Reshape" and self.constants.is_constant(inputs[1])):
            return self.vector(inputs[0])
        if node.op_type == "Concat":
            parts = [self.vector(v) for v in inputs]
            return tuple(d for p in parts if p is not None for d in p) if None not in parts else None
        if node.op_type in ("Gather", "Slice") and all(self.constants.is_constant(v) for v in inputs[1:]):
            return self._selected(node, inputs)
        return None

    def _selected(self, node: ir.Node, inputs: list[ir.Value]) -> tuple[Hashable, ...] | None:
        items = self.vector(inputs[0])
        numbers = [[int(n) for n in self.constants.evaluate(v).reshape(-1)] for v in inputs[1:]]
        if items is None:
            return None
        if node.op_type == "Gather":
            return (
                tuple(items[i] for i in numbers[0]) if all(-len(items) <= i < len(items) for i in numbers[0]) else None
            )
        if len(numbers) < 2 or any(len(n) != 1 for n in numbers):
            return None
        step = numbers[3][0] if len(numbers) > 3 else 1
        return items[numbers[0][0] : numbers[1][0] : step] if step > 0 else None


def _annotated(value: ir.Value) -> tuple[Hashable, ...] | None:
    """The shape written in the graph; None for each dimension it does not say."""
    if value.shape is None:
        return None
    return tuple(
        dim if isinstance(dim, int) else None if dim.value is None else ("symbol", str(dim.value))
        for dim in value.shape
    )
