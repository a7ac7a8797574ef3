"""The way back from :mod:`loracc.passes.decode_weights`: the operators that read quantized weights, and their tensors.

A weight that no delta changed gets the tensors it had, bytes and all. One with deltas folded in
(:class:`loracc.requantized.RequantizedTensor`) gets new codes, scales and zero points, which are computed when they are
written.

1. An operator gets back its type, attributes and inputs; a DequantizeLinear that is gone comes back where it was.
2. A scale or zero point that other weights share is un-shared where it changes.
3. An Add that was an operator's bias is one again, while nothing stands between.
4. Initializers come back in their order.
"""

from __future__ import annotations

import onnx_ir as ir

from loracc.encodings.decoded import DecodedTensor
from loracc.errors import UnsupportedError
from loracc.folded import FoldedTensor
from loracc.passes.decode_weights import BIAS_KEY, ORDER_KEY, ORIGIN_KEY, Origin
from loracc.requantized import RequantizedTensor
from loracc.tensors import dims

__all__ = ["EncodeWeights", "encoded", "is_decoded"]


def is_decoded(tensor: ir.TensorProtocol | None) -> bool:
    """Whether an initializer's value stands for an encoded weight."""
    return isinstance(tensor, DecodedTensor | RequantizedTensor)


def encoded(model: ir.Model) -> ir.Model:
    """The model with its quantized weights as a file has them: itself, where nothing was decoded, else a copy."""
    if not any(is_decoded(_base(value.const_value)) for value in model.graph.initializers.values()):
        return model
    copy = model.clone()
    EncodeWeights()(copy)
    return copy


def _base(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    if isinstance(tensor, FoldedTensor) and not isinstance(tensor, RequantizedTensor):
        return tensor.base
    return tensor


class EncodeWeights(ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        encoder = _Encoder(graph)
        values = [v for v in graph.initializers.values() if is_decoded(_base(v.const_value))]
        # Unchanged ones first: a part that is shared keeps its name for them.
        for value in sorted(values, key=lambda value: isinstance(value.const_value, RequantizedTensor)):
            encoder.encode(value)
        encoder.restore_order()
        return ir.passes.PassResult(model, modified=bool(values))


class _Encoder:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._taken = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
        self._taken |= {str(out.name) for node in graph.all_nodes() for out in node.outputs}

    def encode(self, value: ir.Value) -> None:
        """Put the quantized operands back where the initializer is read."""
        tensor = value.const_value
        decoded = tensor.decoded if isinstance(tensor, RequantizedTensor) else tensor
        if not isinstance(decoded, DecodedTensor) or not isinstance(decoded.origin, Origin):
            raise UnsupportedError(
                f"the quantized weight {value.name!r} cannot change its type: its scales belong to it.",
                hint="Leave --dtype out, or convert the float model and quantise the result.",
            )
        tensors: dict[str, ir.TensorProtocol] = tensor.parts() if isinstance(tensor, RequantizedTensor) else {}
        del self._graph.initializers[str(value.name)]
        # The name is free again for whatever had it; parts of a clone get its name.
        self._taken.discard(str(value.name))
        parts: dict[str, ir.Value] = {}
        readers = list(value.uses())
        if decoded.origin.op_type == "DequantizeLinear":
            self._dequantize(value, decoded.origin, self._parts(decoded.origin, tensors, parts, str(value.name)))
            return
        for node, index in readers:
            origin = node.meta.get(ORIGIN_KEY)
            if not isinstance(origin, Origin) or index != _place(origin):
                raise UnsupportedError(
                    f"the quantized weight {value.name!r} is read by {node.op_type} {node.name!r}, which is no "
                    f"{decoded.origin.op_type}: its codes cannot be written.",
                )
            self._operator(node, origin, self._parts(origin, tensors, parts, str(value.name)))

    def _parts(
        self, origin: Origin, new: dict[str, ir.TensorProtocol], made: dict[str, ir.Value], owner: str
    ) -> dict[int, ir.Value]:
        """The constant inputs of an operator as initializers (rule 2); ``made``: those that this weight has already."""
        roles = {index: part for part, index in origin.parts.items()}
        inputs = {}
        for index, (name, old) in origin.inputs.items():
            part = roles.get(index, "")
            if not part and index != origin.group_index:
                continue  # a bias: it is an Add's, or stays one
            if part in made:
                inputs[index] = made[part]
                continue
            inputs[index] = self._part(name, new.get(part, old), f"{owner}.{part}")
            if part:
                made[part] = inputs[index]
        return inputs

    def _part(self, name: str, tensor: ir.TensorProtocol, otherwise: str) -> ir.Value:
        there = self._graph.initializers.get(name)
        held = there.const_value if there is not None else None
        if there is not None and held is not None and (held is tensor or held.tobytes() == tensor.tobytes()):
            return there
        if name in self._taken:
            name = self._free(otherwise)
        self._taken.add(name)
        value = ir.Value(name=name, shape=ir.Shape(dims(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _free(self, name: str) -> str:
        number, free = 1, name
        while free in self._taken:
            number += 1
            free = f"{name}.{number}"
        return free

    def _dequantize(self, value: ir.Value, origin: Origin, inputs: dict[int, ir.Value]) -> None:
        """Rule 1 for a node that is gone."""
        given = [inputs.get(index) for index in range(origin.count)]
        names = {str(node.name) for node in self._graph.all_nodes()}
        clone = origin.name in names
        node = ir.Node(
            origin.domain,
            origin.op_type,
            given,
            origin.attributes,
            name=f"{origin.name}.{value.name}" if clone else origin.name,
            metadata_props=dict(origin.metadata[0]),
        )
        out = node.outputs[0]
        out.name = self._free(str(value.name) if origin.output in self._taken else origin.output)
        self._taken.add(out.name)
        out.type, out.shape = value.type, value.shape
        out.metadata_props.update(origin.metadata[1])
        node.meta[ORDER_KEY] = origin.order
        value.replace_all_uses_with(out, replace_graph_outputs=True)
        after = next((other for other in self._graph if other.meta.get(ORDER_KEY, -1) > origin.order), None)
        users = {user for user, _ in out.uses()}
        first = next((other for other in self._graph if other is after or other in users), None)
        if first is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(first, node)

    def _operator(self, node: ir.Node, origin: Origin, inputs: dict[int, ir.Value]) -> None:
        """Rule 1 for a node that was rewritten; rule 3."""
        data = 1 - _place(origin)
        given = {0 if origin.op_type != "GatherBlockQuantized" else 1: node.inputs[data]}
        bias = _bias_of(node)
        if bias is not None:
            given[bias.meta[BIAS_KEY]] = bias.inputs[1]
        node.domain, node.op_type = origin.domain, origin.op_type
        node.attributes.clear()
        for attribute in origin.attributes:
            node.attributes[attribute.name] = attribute
        node.resize_inputs(origin.count)
        for index in range(origin.count):
            node.replace_input_with(index, given.get(index, inputs.get(index)))
        if bias is not None:
            _take_over(node, bias)
        del node.meta[ORIGIN_KEY]

    def restore_order(self) -> None:
        """Rule 4."""
        initializers = self._graph.initializers
        order = {name: place for place, name in enumerate(self._graph.meta.get(ORDER_KEY, ()))}
        values = sorted(initializers.values(), key=lambda value: order.get(str(value.name), len(order)))
        initializers.clear()
        for value in values:
            initializers.add(value)


def _place(origin: Origin) -> int:
    """Which input of the rewritten node the weight is."""
    return 0 if origin.op_type == "GatherBlockQuantized" else 1


def _bias_of(node: ir.Node) -> ir.Node | None:
    """The Add that was this node's bias and still reads its result alone."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or BIAS_KEY not in uses[0][0].meta or node.outputs[0].is_graph_output():
        return None
    return uses[0][0] if uses[0][1] == 0 else None


def _take_over(node: ir.Node, bias: ir.Node) -> None:
    """The node's result takes the place of the Add's."""
    total, out = bias.outputs[0], node.outputs[0]
    name = str(total.name)
    graph = node.graph
    assert graph is not None
    for index, output in enumerate(list(graph.outputs)):
        if output is total:
            graph.outputs[index] = out
    total.replace_all_uses_with(out)
    graph.remove(bias, safe=True)
    out.name = name
