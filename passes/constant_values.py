"""Weight-only subexpressions are constants, whatever operators they are made of, and are evaluated when asked for.

A LoRA module computes with its weights alone a good deal: transposes, a merged QKV's grouped convolution and scatter,
DoRA's norms. What no input of the model reaches is known. It is evaluated by ONNX's reference implementation, node by
node, with every float in float64: a delta is rounded once, when it is folded, and not by the exporter's intermediate
steps (DESIGN.md 4).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from loracc.dtypes import Array, is_float
from loracc.tensors import dims

__all__ = ["Constants", "element_type", "is_onnx", "plain_tensor"]

#: Evaluated results up to this many elements are kept: scales, index vectors, norms.
_KEPT_ELEMENTS = 1 << 16
#: Operators whose result is not a function of their inputs, or that another one of their inputs decides.
_IMPURE = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

#: Operators whose tensor inputs (for Reshape and Gather the first) and outputs have one element type.
_SAME_TYPE = frozenset(
    {"Add", "Conv", "Div", "Gemm", "Identity", "MatMul", "Mul", "Neg", "Relu", "Sub", "Sum", "Transpose"}
)
_FIRST_TYPE = frozenset({"Dropout", "Gather", "Reshape"})


def is_onnx(node: ir.Node) -> bool:
    """Whether the node is of ONNX's own operator set."""
    return node.domain in ("", "ai.onnx")


def plain_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer that nobody can override, or of a Constant node; None for anything else."""
    if value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is not None and is_onnx(node) and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return None


def element_type(value: ir.Value) -> ir.DataType | None:
    """A value's element type; where the graph does not say it, that of an operand that must have the same."""
    seen = 0
    while value.dtype is None and seen < 32:
        seen += 1
        node = value.producer()
        if node is not None and is_onnx(node) and node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node is None or not is_onnx(node) or node.op_type not in _SAME_TYPE | _FIRST_TYPE:
            return None
        operands = [v for v in node.inputs[: 1 if node.op_type in _FIRST_TYPE else None] if v is not None]
        value = next((v for v in operands if v.dtype is not None), operands[0])
    return value.dtype


class Constants:
    """Which values of a graph depend on no input, and what they are.

    Args:
        opset: The model's version of ONNX's operator set.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._known: dict[ir.Value, bool] = {}
        self._kept: dict[ir.Value, Array] = {}

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether no graph input reaches the value; an initializer that is a graph input is the caller's."""
        if value is None:
            return False
        for node in self._unknown(value):
            inputs = [v for v in node.inputs if v is not None]
            pure = is_onnx(node) and node.op_type not in _IMPURE and not _has_graph(node)
            known = pure and (bool(inputs) or node.op_type == "Constant") and all(self._is_known(v) for v in inputs)
            self._known.update(dict.fromkeys(node.outputs, known))
        return self._is_known(value)

    def _is_known(self, value: ir.Value) -> bool:
        known = self._known.get(value)
        return known if known is not None else plain_tensor(value) is not None

    def _unknown(self, value: ir.Value) -> Iterator[ir.Node]:
        """Producers that have not been looked at, operands first; without recursion, since graphs are deep."""
        stack = [(value.producer(), False)]
        while stack:
            node, ready = stack.pop()
            if node is None or node.outputs[0] in self._known:
                continue
            if ready:
                yield node
            else:
                stack.append((node, True))
                stack.extend((v.producer(), False) for v in node.inputs if v is not None)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of a constant; evaluated only where the graph does not say it."""
        tensor = plain_tensor(value)
        if tensor is not None:
            return dims(tensor)
        if value.shape is not None and value.shape.is_static():
            return tuple(int(n) for n in value.shape.numpy())
        return self.evaluate(value).shape

    def scalar(self, value: ir.Value) -> float | None:
        """The value of a one-element constant, else None."""
        return float(self.evaluate(value).reshape(())) if np.prod(self.shape(value), dtype=int) == 1 else None

    def evaluate(self, value: ir.Value) -> Array:
        """The value of a constant; floats come as float64. The result is not to be written to."""
        memo: dict[ir.Value, Array] = {}
        for node in _producers(value, self._kept):
            inputs = [None if v is None else self._leaf(v, memo) for v in node.inputs]
            for output, array in zip(node.outputs, self._run(node, inputs), strict=False):
                memo[output] = array
                if array.size <= _KEPT_ELEMENTS:
                    self._kept[output] = array
        return self._leaf(value, memo)

    def _leaf(self, value: ir.Value, memo: dict[ir.Value, Array]) -> Array:
        if value in memo:
            return memo[value]
        if value in self._kept:
            return self._kept[value]
        tensor = plain_tensor(value)
        assert tensor is not None, f"{value.name!r} is not a constant"
        return _widened(tensor.numpy())

    def _run(self, node: ir.Node, inputs: list[Array | None]) -> list[Array]:
        if node.op_type in ("Identity", "Cast"):
            [array] = inputs
            assert array is not None
            return [array if node.op_type == "Identity" else _cast(array, node)]
        names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
        graph = onnx.helper.make_graph(
            [proto],
            "constant",
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in names if n],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in proto.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        feeds = {name: array for name, array in zip(names, inputs, strict=True) if name}
        return [_widened(np.asarray(result)) for result in ReferenceEvaluator(model).run(None, feeds)]


def _producers(value: ir.Value, kept: dict[ir.Value, Array]) -> Iterator[ir.Node]:
    """The nodes a constant is computed by, operands first."""
    done: set[ir.Node] = set()
    stack = [(value, False)]
    while stack:
        current, ready = stack.pop()
        node = current.producer()
        if node is None or node in done or current in kept or plain_tensor(current) is not None:
            continue
        if ready:
            done.add(node)
            yield node
        else:
            stack.append((current, True))
            stack.extend((v, False) for v in node.inputs if v is not None)


def _has_graph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _widened(array: Array) -> Array:
    """Floats of any width, ml_dtypes' included, as float64."""
    return array.astype(np.float64) if array.dtype.kind in "fV" and array.dtype != np.float64 else array


def _cast(array: Array, node: ir.Node) -> Array:
    """A Cast among floats is left out: no intermediate rounding."""
    to = ir.DataType(node.attributes["to"].as_int())
    return array.astype(np.float64) if is_float(to) else array.astype(to.numpy())
