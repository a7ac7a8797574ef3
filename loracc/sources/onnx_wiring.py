"""Every value that an ONNX node reads comes from one place, every name is text, every attribute has a type.

onnx_ir makes a placeholder for a value that nothing produces and goes on, and keeps one of two initializers of one name
(ONNX Runtime takes the last); protobuf gives bytes for a name that is not UTF-8. All of it is told here, before the
graph is built. What ONNX Runtime puts right is put right here too: nodes that stand before what they read, and sizes
below zero, which old exporters write for "any".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from loracc.errors import InputError

__all__ = ["check_wiring", "forget_negative_sizes", "put_in_order"]


def check_wiring(path: Path, proto: onnx.ModelProto) -> None:
    """Check the main graph and the graphs inside it.

    Raises:
        InputError: Names the first node that reads what nothing produces, or the first name that is not text.
    """
    _check_graph(path, proto.graph, frozenset())
    for name, several in _by_name(proto.graph.initializer).items():
        if any(other != several[0] for other in several[1:]):
            raise _broken(path, f"there are {len(several)} initializers {name!r}, and they differ")
    for function in proto.functions:
        _check_nodes(path, list(function.node), frozenset(function.input))


def _check_graph(path: Path, graph: onnx.GraphProto, outer: frozenset[str]) -> None:
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known = _check_nodes(path, list(graph.node), outer | given)
    for output in graph.output:
        if output.name not in known:
            raise _broken(path, f"output {output.name!r} is produced by nothing")


def _check_nodes(path: Path, nodes: list[onnx.NodeProto], outer: frozenset[str]) -> frozenset[str]:
    """Check a list of nodes; returns every name that is known in it."""
    known = outer | {name for node in nodes for name in node.output}
    for name in (*known, *(node.name for node in nodes)):
        if not isinstance(name, str):
            raise _broken(path, f"the name {name!r} is not UTF-8")
    for node in nodes:
        for name in node.input:
            if name and name not in known:
                raise _broken(path, f"node {node.name!r} ({node.op_type}) reads {name!r}, which nothing produces")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                raise _broken(path, f"attribute {attribute.name!r} of node {node.name!r} has no type")
        for graph in _graphs(node):
            _check_graph(path, graph, known)
    return known


def _by_name(tensors: Iterable[onnx.TensorProto]) -> dict[str, list[onnx.TensorProto]]:
    named: dict[str, list[onnx.TensorProto]] = {}
    for tensor in tensors:
        named.setdefault(tensor.name, []).append(tensor)
    return named


def put_in_order(path: Path, model: ir.Model) -> None:
    """Nodes behind what they read; a model whose nodes are stays as it is.

    Raises:
        InputError: There is no such order.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        if _in_order(graph, set()):
            continue
        try:
            graph.sort()
        except ValueError:
            raise _broken(path, f"nodes of {graph.name!r} wait for one another in a circle") from None


def _in_order(graph: Iterable[ir.Node], before: set[ir.Node]) -> bool:
    """Whether every node's operands are from outside or from a node before it; ``before`` grows."""
    inside = set(graph)
    for node in graph:
        if any(
            producer in inside and producer not in before
            for read in _read_by(node)
            for producer in [read.producer()]
            if producer is not None
        ):
            return False
        if any(not _in_order(body, set()) for body in _bodies(node)):
            return False
        before.add(node)
    return True


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its bodies included."""
    yield from (value for value in node.inputs if value is not None)
    for body in _bodies(node):
        for inner in body:
            yield from _read_by(inner)
        yield from body.outputs


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def forget_negative_sizes(proto: onnx.ModelProto) -> None:
    """A size below zero is no size: ONNX Runtime takes it for one that is not known."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.ClearField("dim_value")


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _broken(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: the graph does not hang together: {problem}.",
        hint="Check the model with onnx.checker.check_model, and export it again.",
    )
