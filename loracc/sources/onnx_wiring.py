"""Every value that an ONNX node reads comes from somewhere, every name is text, every attribute has a type.

onnx_ir makes a placeholder for a value that nothing produces and goes on; protobuf gives bytes for a name that is not
UTF-8. Both are told here, before the graph is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from loracc.errors import InputError

__all__ = ["check_wiring"]


def check_wiring(path: Path, proto: onnx.ModelProto) -> None:
    """Check the main graph and the graphs inside it.

    Raises:
        InputError: Names the first node that reads what nothing produces, or the first name that is not text.
    """
    _check_graph(path, proto.graph, frozenset())
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
