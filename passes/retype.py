"""Change the precision of a graph: its float tensors, and everything that says what type they are.

Rules:

1. Float initializers change lazily. A weight that is itself a cast or a fold is cast from its own source: a fold at
   higher precision is the fold before its rounding, not a rounded one made wide.
2. ``Cast``'s target, the value of ``Constant`` and ``ConstantOfShape``, and ``dtype`` attributes change with them.
   A mask's filler, the lowest number of the old type, becomes that of the new type, and not −inf (0 · −inf is NaN).
3. Inputs keep their type, so that the same arrays feed both graphs: a Cast follows each. Outputs too, when asked.
4. A node that may not have the new type (by its schema, or by ``in_float``) runs in float32 between Casts.
5. With ``rounding``, every float result is rounded to that type and back: arithmetic of a type that the runtime
   has no kernels for, emulated in a wider one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.dtypes import round_to
from loracc.folded import FoldedTensor
from loracc.passes.value_types import allows, fill_types, schema_of
from loracc.tensors import dims

__all__ = ["RetypePass", "recast"]

_PRECISION = {
    ir.DataType.BFLOAT16: 8,
    ir.DataType.FLOAT16: 11,
    ir.DataType.FLOAT: 24,
    ir.DataType.DOUBLE: 53,
}
#: Larger tensors are not looked into for fillers.
_FILLER_ELEMENTS = 1 << 12
#: Attributes that hold an element type.
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "output_datatype")
#: Operators whose results are elements of their inputs: rounding them again changes nothing.
_MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


def recast(tensor: ir.TensorProtocol, dtype: ir.DataType) -> FoldedTensor:
    """``tensor`` in another dtype, lazily, from the most precise value there is (rule 1)."""
    if isinstance(tensor, FoldedTensor):
        return FoldedTensor(tensor.base, tensor.bindings, dtype)
    return FoldedTensor(tensor, (), dtype)


def _filler(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol | None:
    """A small tensor that holds numbers beyond the range of ``dtype``, with the range's ends in their place.

    A scalar's number may be any; a vector's only the ends of its own type's range: a weight that large is no filler,
    and its overflow is an error for whoever computes it. None where there is nothing to do.
    """
    size = math.prod(dims(tensor))
    largest = _largest(dtype)
    if size > _FILLER_ELEMENTS or tensor.dtype not in _PRECISION or _largest(tensor.dtype) <= largest:
        return None
    if isinstance(tensor, FoldedTensor) and tensor.bindings:
        return None
    values = np.asarray(tensor.numpy()).astype(np.float64)
    beyond = np.isfinite(values) & (np.abs(values) > largest)
    if size > 1:
        beyond &= np.abs(values) == _largest(tensor.dtype)
    if not beyond.any():
        return None
    clipped = np.where(beyond, np.clip(values, -largest, largest), values)
    return ir.tensor(round_to(clipped, dtype), dtype=dtype, name=tensor.name)


def _largest(dtype: ir.DataType) -> float:
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]  # untyped upstream


class RetypePass(ir.passes.InPlacePass):
    """Give a graph's float tensors the type ``to``.

    Args:
        to: The new type.
        sources: The types that change; by default every float type of lower precision than ``to``.
        keep_outputs: Cast graph outputs back to the type they had.
        in_float: Says which nodes cannot run in ``to``; asked after the schema.
        rounding: Round every float result to this type (rule 5).

    Attributes:
        wrapped: Names of the nodes that stayed in float32 (rule 4), filled by ``call``.
    """

    def __init__(
        self,
        to: ir.DataType,
        *,
        sources: Collection[ir.DataType] | None = None,
        keep_outputs: bool = True,
        in_float: Callable[[ir.Node, Collection[ir.Value]], bool] | None = None,
        rounding: ir.DataType | None = None,
    ) -> None:
        super().__init__()
        self.to = to
        lower = [dtype for dtype, bits in _PRECISION.items() if bits < _PRECISION[to]]
        self.sources = frozenset(lower if sources is None else sources) - {to}
        self.keep_outputs = keep_outputs
        self.in_float = in_float
        self.rounding = rounding
        self.wrapped: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.wrapped = []
        fill_types(model)
        graphs = [model.graph, *model.graph.subgraphs()]
        nodes = [node for graph in graphs for node in graph]
        every = [value for node in nodes for value in (*node.inputs, *node.outputs)]
        changing = {value for value in every if value is not None and self._changes(value)}
        kept_outputs = [value.dtype if self._changes(value) else None for value in model.graph.outputs]
        forbidden = [
            (node, [i for i, value in enumerate(node.inputs) if value in changing])
            for node in nodes
            if self._runs_in_float(node, changing, model.graph.opset_imports)
        ]
        for node in nodes:
            self._attributes(node)
        for graph in graphs:
            self._initializers(graph)
            for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
                if self._changes(value) and value not in model.graph.inputs:
                    value.type = _with_dtype(value.type, self.to)
        for value in model.graph.inputs:
            if value.dtype in self.sources:
                self._after_input(model.graph, value)
        for node, indices in forbidden:
            self._wrap(node, indices, changing)
        if self.rounding is not None:
            for node in nodes:
                self._round(node, changing)
        if self.keep_outputs:
            for index, (value, dtype) in enumerate(zip(list(model.graph.outputs), kept_outputs, strict=True)):
                if dtype is not None and value.dtype == self.to:
                    self._before_output(model.graph, index, value, dtype)
        return ir.passes.PassResult(model, bool(changing))

    def _changes(self, value: ir.Value) -> bool:
        return value.dtype in self.sources

    def _initializers(self, graph: ir.Graph) -> None:
        """Rule 1. One that is also an input may be fed by the user: it keeps its type, as inputs do."""
        for value in graph.initializers.values():
            if self._changes(value) and value.const_value is not None and not value.is_graph_input():
                value.const_value = self._tensor(value.const_value)
                value.type = ir.TensorType(self.to)

    def _tensor(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if (filler := _filler(tensor, self.to)) is not None:
            return filler
        if self.rounding is not None:  # the weight's own rounding is part of what is emulated
            return FoldedTensor(tensor, (), self.to)
        return recast(tensor, self.to)

    def _attributes(self, node: ir.Node) -> None:
        """Rule 2."""
        if node.op_type == "Cast":
            self._type_attribute(node, "to")
        elif node.op_type == "Constant":
            self._constant(node)
        elif node.op_type == "ConstantOfShape" and ir.DataType.FLOAT in self.sources and "value" not in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, self.to.numpy())))
        for name in _TYPE_ATTRIBUTES:
            self._type_attribute(node, name)
        attribute = node.attributes.get("value")
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in self.sources:
                exact = np.asarray(tensor.numpy()).astype(np.float64)
                value = _filler(tensor, self.to) or ir.tensor(round_to(exact, self.to), dtype=self.to, name=tensor.name)
                node.attributes["value"] = ir.AttrTensor("value", value)

    def _type_attribute(self, node: ir.Node, name: str) -> None:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int() in self.sources:
            node.attributes[name] = ir.AttrInt64(name, int(self.to))

    def _constant(self, node: ir.Node) -> None:
        """``value_float`` and ``value_floats`` can only be float32."""
        for name in ("value_float", "value_floats"):
            attribute = node.attributes.get(name)
            if attribute is not None and ir.DataType.FLOAT in self.sources:
                del node.attributes[name]
                exact = np.asarray(attribute.value, np.float32).astype(np.float64)
                plain = ir.tensor(exact.astype(np.float32))
                value = _filler(plain, self.to) or ir.tensor(round_to(exact, self.to), dtype=self.to)
                node.attributes["value"] = ir.AttrTensor("value", value)

    def _runs_in_float(self, node: ir.Node, changing: Collection[ir.Value], opsets: dict[str, int]) -> bool:
        """Rule 4. Control flow is never wrapped: its bodies are converted."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v in changing]
        if not values or self.to == ir.DataType.FLOAT or _has_subgraph(node) or node.op_type in ("Cast", "Constant"):
            return False
        if not allows(schema_of(node, opsets), node, values, self.to):
            return True
        return self.in_float is not None and self.in_float(node, values)

    def _wrap(self, node: ir.Node, indices: list[int], changing: Collection[ir.Value]) -> None:
        self.wrapped.append(f"{node.op_type} {node.name!r}")
        for index in indices:
            value = node.inputs[index]
            assert value is not None
            cast = _cast(value, ir.DataType.FLOAT, f"{node.name}.in{index}")
            node.prepend(cast)
            node.replace_input_with(index, cast.outputs[0])
        for output in node.outputs:
            if output in changing:
                output.type = _with_dtype(output.type, ir.DataType.FLOAT)
                _follow(node, output, [self.to])

    def _round(self, node: ir.Node, changing: Collection[ir.Value]) -> None:
        """Rule 5."""
        if node.op_type in _MOVES or _has_subgraph(node) or self.rounding is None:
            return
        for output in node.outputs:
            if output in changing:
                _follow(node, output, [self.rounding, self.to])

    def _after_input(self, graph: ir.Graph, value: ir.Value) -> None:
        """Rule 3."""
        cast = _cast(value, self.to, f"{value.name}.retyped")
        _redirect(value, cast.outputs[0])
        _insert_first(graph, cast)
        for index, output in enumerate(list(graph.outputs)):
            if output is value:
                graph.outputs[index] = cast.outputs[0]

    def _before_output(self, graph: ir.Graph, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """The output's name moves to the Cast's result; the value that had it gets another."""
        name, value.name = value.name, f"{value.name}.wide"
        cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{name}.narrow")
        out = cast.outputs[0]
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(dtype)
        graph.append(cast)
        graph.outputs[index] = out


def _has_subgraph(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )


def _with_dtype(kind: ir.TypeProtocol | None, dtype: ir.DataType) -> ir.TypeProtocol:
    """The same tensor, sequence or optional type with other elements."""
    if isinstance(kind, ir.SequenceType):
        return ir.SequenceType(_with_dtype(kind.elem_type, dtype))
    if isinstance(kind, ir.OptionalType):
        return ir.OptionalType(_with_dtype(kind.elem_type, dtype))
    return ir.TensorType(dtype)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=name)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, value.shape, ir.TensorType(to)
    return node


def _redirect(value: ir.Value, to: ir.Value) -> None:
    """Every reader of ``value`` but ``to``'s own producer reads ``to`` instead."""
    for user, index in tuple(value.uses()):
        if user is not to.producer():
            user.replace_input_with(index, to)


def _follow(node: ir.Node, output: ir.Value, types: list[ir.DataType]) -> None:
    """Put a chain of Casts between ``output`` and all its readers; a graph's output moves to the end of the chain."""
    last, nodes = output, []
    for step, dtype in enumerate(types):
        cast = _cast(last, dtype, f"{output.name}.cast{step}")
        nodes.append(cast)
        last = cast.outputs[0]
    first = nodes[0]
    for user, index in tuple(output.uses()):
        if user is not first:
            user.replace_input_with(index, last)
    node.append(nodes)
    graph = node.graph
    if graph is not None:
        for index, value in enumerate(list(graph.outputs)):
            if value is output:
                graph.outputs[index] = last
                output.name, last.name = f"{output.name}.raw", output.name


def _insert_first(graph: ir.Graph, node: ir.Node) -> None:
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
