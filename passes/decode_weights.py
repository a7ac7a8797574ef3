"""Quantized weights become float initializers: the graph as it was before it was quantized, lazily.

``DequantizeLinear(codes, scales, zeros)`` goes, and its result is an initializer that holds a
:class:`loracc.encodings.decoded.DecodedTensor`; ``MatMulNBits(x, ...)`` becomes ``MatMul(x, W[K, N])`` and so on.
Sites, binding, raising and unfusing then need no word about quantization. :mod:`loracc.passes.encode_weights` is the
way back: what it needs is kept on the tensors (:class:`Origin`), on the nodes and on the graph (``meta``).

Rules:

1. Only constant codes of the main graph that nobody else may give are decoded, and only where all of the operand fits
   its operator's specification. Anything else stays, and is listed (:func:`undecoded`) for whoever would bind to it.
2. The initializer gets the name that the weight had before it was quantized (quantizers add a suffix), if that is free.
3. Operators that read the same codes, scales and zero points share one initializer.
4. A bias of the operator becomes an Add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from loracc.encodings.decoded import DecodedTensor
from loracc.passes.encoded_operands import Operand, Unencoded, operand_of

__all__ = ["BIAS_KEY", "ORDER_KEY", "ORIGIN_KEY", "DecodeWeights", "Origin", "undecoded", "unquantized_name"]

#: ``Node.meta``: the :class:`Origin` of a node that was another operator.
ORIGIN_KEY = "loracc.encoded"
#: ``Node.meta``: an Add that was the bias of the operator before it; the position of the bias among its inputs.
BIAS_KEY = "loracc.encoded_bias"
#: ``Graph.meta``: names of the initializers, and ``Node.meta``: the node's place; as they were.
ORDER_KEY = "loracc.order"
_REFUSED = "loracc.undecoded"
#: What quantizers put behind a weight's name.
_SUFFIX = re.compile(
    r"(_DequantizeLinear_Output|_dequantized|_quantized|_DQ_Q\d+|_DQ|_Q\d+(G\d+)?|_qweight|_q[48]|_quant|_dq)$"
)


@dataclass(frozen=True)
class Origin:
    """An operator that read an encoded weight.

    Attributes:
        domain, op_type, attributes: Of the node.
        name: Of the node, where it is gone.
        output: Name of the node's result, where it is gone.
        inputs: Constant inputs by position, with their names: the parts of the encoding and what stood beside them.
        parts: Which position is "codes", "scales", "zeros".
        order: The node's place in the graph.
        count: How many inputs the node has.
        metadata: The node's and the result's.
    """

    domain: str
    op_type: str
    attributes: tuple[ir.Attr, ...]
    name: str
    output: str
    inputs: Mapping[int, tuple[str, ir.TensorProtocol]]
    parts: Mapping[str, int]
    order: int
    count: int
    metadata: tuple[Mapping[str, str], Mapping[str, str]] = field(default_factory=lambda: ({}, {}))

    @property
    def group_index(self) -> int:
        """Position of an input that only says again what the operator does anyway; -1 for none."""
        return 4 if self.op_type == "MatMulNBits" else -1


def undecoded(model: ir.Model) -> Mapping[str, str]:
    """Quantized weights that no delta can be folded into: {name that the weight had: why}."""
    refused: Mapping[str, str] = model.graph.meta.get(_REFUSED, {})
    return refused


def unquantized_name(name: str) -> str:
    """What a weight was called before a quantizer named it.

    >>> unquantized_name("layers.0.q_proj.MatMul.weight_Q4"), unquantized_name("fc.weight_quantized")
    ('layers.0.q_proj.MatMul.weight', 'fc.weight')
    """
    return _SUFFIX.sub("", name)


class DecodeWeights(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [(node, operand) for node in graph if (operand := operand_of(node)) is not None]
        refused = {
            unquantized_name(_codes_name(node)): f"{node.op_type} {node.name!r}: {operand.reason}"
            for node, operand in found
            if isinstance(operand, Unencoded)
        }
        graph.meta[_REFUSED] = {**refused, **_other_integer_weights(graph)}
        operands = [(node, operand) for node, operand in found if isinstance(operand, Operand)]
        if not operands:
            return ir.passes.PassResult(model, modified=False)
        graph.meta[ORDER_KEY] = tuple(graph.initializers)
        for index, node in enumerate(graph):
            node.meta[ORDER_KEY] = index
        decoder = _Decoder(graph)
        for node, operand in operands:
            decoder.decode(node, operand)
        return ir.passes.PassResult(model, modified=True)


class _Decoder:
    """One graph's operators, one after the other."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[object, ...], ir.Value] = {}
        self._taken = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
        self._taken |= {str(out.name) for node in graph.all_nodes() for out in node.outputs}

    def decode(self, node: ir.Node, operand: Operand) -> None:
        """Put the decoded initializer in the place of the node's operand (rules 2 to 4)."""
        origin, parts = _origin(node, operand), [node.inputs[i] for i in operand.parts.values()]
        alone = node.op_type == "DequantizeLinear"
        # A result that is gone for good keeps its own dtype; an operator's operand has its scales'.
        dtype = node.outputs[0].dtype if alone else None
        key = (*map(id, parts), operand.weight.blocks, operand.turned, node.op_type, origin.output if alone else "")
        value = self._known.get(key)
        if value is None:
            value = self._known[key] = self._initializer(operand, origin, dtype or operand.weight.scales.dtype)
        if alone:
            node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
            self._graph.remove(node, safe=True)
        else:
            _REPLACED[node.op_type](node, value, self)
            node.meta[ORIGIN_KEY] = origin
        for index in origin.inputs:
            name = origin.inputs[index][0]
            part = self._graph.initializers.get(name)
            if part is not None and not part.uses() and not part.is_graph_output():
                del self._graph.initializers[name]

    def _initializer(self, operand: Operand, origin: Origin, dtype: ir.DataType) -> ir.Value:
        name = self.free_name(unquantized_name(operand.weight.name), operand.weight.name)
        tensor = DecodedTensor(operand.weight, name, dtype, turned=operand.turned, origin=origin)
        shape = operand.weight.shape[::-1] if operand.turned else operand.weight.shape
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def free_name(self, *wanted: str) -> str:
        """The first of these that nothing has, else the last with a number."""
        free = next((name for name in wanted if name not in self._taken), None)
        number = 1
        while free is None:
            number += 1
            free = None if (name := f"{wanted[-1]}.{number}") in self._taken else name
        self._taken.add(free)
        return free


def _origin(node: ir.Node, operand: Operand) -> Origin:
    constants = {
        index: (str(value.name), value.const_value)
        for index, value in enumerate(node.inputs)
        if value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None
    }
    if node.op_type != "DequantizeLinear":  # what is multiplied or looked up stays an input
        constants.pop(1 if node.op_type == "GatherBlockQuantized" else 0, None)
    return Origin(
        node.domain,
        node.op_type,
        tuple(node.attributes.values()),
        str(node.name),
        str(node.outputs[0].name),
        constants,
        dict(operand.parts),
        int(node.meta[ORDER_KEY]),
        len(node.inputs),
        (dict(node.metadata_props), dict(node.outputs[0].metadata_props)),
    )


def _as_product(node: ir.Node, value: ir.Value, decoder: _Decoder) -> None:
    """``MatMulNBits(x, ...)``, ``DynamicQuantizeMatMul(x, ...)``: x · W, and the bias behind it."""
    position = 5 if node.op_type == "MatMulNBits" else 4
    bias = node.inputs[position] if position < len(node.inputs) else None
    x = node.inputs[0]
    _rewrite(node, "MatMul", [x, value], {})
    if bias is not None:
        _add_bias(node, bias, position, decoder)


def _add_bias(node: ir.Node, bias: ir.Value, position: int, decoder: _Decoder) -> None:
    out = node.outputs[0]
    add = ir.node("Add", [out, bias], name=decoder.free_name(f"{node.name}.bias"))
    total = add.outputs[0]
    total.type, total.shape = out.type, out.shape
    add.meta[BIAS_KEY] = position
    users = [(user, index) for user, index in out.uses() if user is not add]
    for user, index in users:
        user.replace_input_with(index, total)
    assert node.graph is not None
    for index, output in enumerate(list(node.graph.outputs)):
        if output is out:
            node.graph.outputs[index] = total
    name = str(out.name)
    out.name, total.name = decoder.free_name(f"{name}.product"), name
    node.append(add)


def _as_gather(node: ir.Node, value: ir.Value, decoder: _Decoder) -> None:
    """``GatherBlockQuantized(codes, ids, ...)``: rows of W."""
    _rewrite(node, "Gather", [value, node.inputs[1]], {"axis": 0})


def _rewrite(node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, int]) -> None:
    node.domain, node.op_type = "", op_type
    node.resize_inputs(len(inputs))
    for index, given in enumerate(inputs):
        node.replace_input_with(index, given)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)


_REPLACED = {
    "MatMulNBits": _as_product,
    "DynamicQuantizeMatMul": _as_product,
    "GatherBlockQuantized": _as_gather,
}
#: Operators that multiply with integers and leave the scale to others.
_INTEGER_PRODUCTS = {
    "MatMulInteger": 1, "ConvInteger": 1, "QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "MatMulIntegerToFloat": 1,
    "QAttention": 1, "MatMulBnb4": 1, "QMoE": 2,
}  # fmt: skip


def _codes_name(node: ir.Node) -> str:
    index = 1 if node.op_type in ("MatMulNBits", "DynamicQuantizeMatMul") else 0
    value = node.inputs[index]
    return str(value.name) if value is not None else ""


def _other_integer_weights(graph: ir.Graph) -> dict[str, str]:
    """Constant weights of operators that this module has no rule for."""
    found = {}
    for node in graph:
        index = _INTEGER_PRODUCTS.get(node.op_type)
        value = node.inputs[index] if index is not None and index < len(node.inputs) else None
        if value is not None and value.is_initializer():
            found[unquantized_name(str(value.name))] = (
                f"{node.op_type} {node.name!r}: its codes are multiplied as integers, with the scale elsewhere"
            )
    return found
