"""Nodes of a branch, and how its end joins the product: so that without a delta every bit is the base's.

IEEE addition has one trap: -0 + 0 = +0. So branches are *subtracted*: y - (+0) = y for every y, and a product without
terms is +0. Where the sign is turned:

    Gemm        y = α·x·W + β·C  takes the branch through its C:  C' = C - (α/β)·t·B, a Gemm of its own with C as it is
    otherwise   y' = y - t·B

with t = -x·A. The first needs no addition of its own, and the product keeps its place in the runtime's fusions with
what follows (Gemm and activation). The second stands right behind the product, before its bias, so that bias,
activation and residual are fused as they were; but behind the bias where the runtime makes one Gemm of product and
bias, which it does when the rows are static or there are two axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from loracc.errors import UnsupportedError

__all__ = ["PREFIX", "BranchNodes", "detach", "join", "subtract"]

#: Names of all nodes that a branch adds.
PREFIX = "loracc.delta/"


class BranchNodes:
    """Makes the nodes of one branch; ``made`` holds them in order.

    Args:
        dtype: Of the values.
        stem: What the nodes are named after.
    """

    def __init__(self, dtype: ir.DataType, stem: str) -> None:
        self.dtype, self.stem = dtype, stem
        self.made: list[ir.Node] = []

    def __call__(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        part: str,
        dtype: ir.DataType | None = None,
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """One node; its first value."""
        name = f"{PREFIX}{self.stem}/{part}"
        node = ir.node(op, inputs, attributes=attributes, name=name, num_outputs=outputs)
        for index, out in enumerate(node.outputs):
            out.name, out.type = f"{name}.out{index or ''}", ir.TensorType(dtype or self.dtype)
        self.made.append(node)
        return node.outputs[0]


def join(node: ir.Node, t: ir.Value, b: ir.Value, nodes: BranchNodes) -> None:
    """Let the branch ``t·b`` into the result of ``node``; t is -x·A.

    Args:
        node: The product with the weight; what reads it afterwards reads product and delta.
        t: ``[..., rank]``, the negative.
        b: ``[rank, out]`` (``[batch, rank, out]`` where t has three axes).
        nodes: Takes the nodes; they are put into the graph here.
    """
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if node.op_type == "Gemm":
        c = node.inputs[2] if len(node.inputs) > 2 else None
        if c is not None and beta:
            before = nodes("Gemm", [t, b, c], "up", alpha=-alpha / beta)
            node.prepend(nodes.made)
            node.replace_input_with(2, before)
            return
        y = node.outputs[0]
        _replace(node, y, nodes("Gemm", [t, b, y], "up", alpha=-alpha), nodes)
        return
    subtract(node, nodes("MatMul", [t, b], "up"), nodes)


def subtract(node: ir.Node, delta: ir.Value, nodes: BranchNodes) -> None:
    """``y - delta`` takes the place of ``node``'s result, or of its sum with the bias (see the module's docstring)."""
    end = _end(node)
    producer = end.producer()
    assert producer is not None
    _replace(producer, end, nodes("Sub", [end, delta], "join"), nodes)


def _end(node: ir.Node) -> ir.Value:
    y = node.outputs[0]
    uses = list(y.uses())
    if node.op_type != "MatMul" or len(uses) != 1 or y.is_graph_output() or not _becomes_gemm(node):
        return y
    (user, index) = uses[0]
    other = user.inputs[1 - index] if user.op_type == "Add" and user.domain == "" else None
    bias = other is not None and other.is_initializer() and other.shape is not None and len(other.shape) == 1
    return user.outputs[0] if bias else y


def _becomes_gemm(node: ir.Node) -> bool:
    x = node.inputs[0]
    shape = x.shape if x is not None else None
    return shape is not None and (len(shape) == 2 or all(isinstance(dim, int) for dim in shape))


def _replace(anchor: ir.Node, end: ir.Value, total: ir.Value, nodes: BranchNodes) -> None:
    total.shape = end.shape
    mine = set(nodes.made)
    for user, index in list(end.uses()):
        if user not in mine:
            user.replace_input_with(index, total)
    anchor.append(nodes.made)
    graph = anchor.graph
    assert graph is not None
    _swap_output(graph, end, total, f"{total.name}.base")


def _swap_output(graph: ir.Graph | ir.Function, end: ir.Value, total: ir.Value, kept: str) -> None:
    """Where ``end`` is an output of the graph, ``total`` is it from now on, under its name."""
    for index, output in enumerate(list(graph.outputs)):
        if output is end:
            graph.outputs[index] = total
            end.name, total.name = kept, end.name
            total.type, total.shape = end.type, end.shape


def detach(model: ir.Model, parameters: Sequence[str]) -> None:
    """Take every branch out again, in place: what is left should be the base, node for node.

    Args:
        model: A graph with branches.
        parameters: Names of its A's and B's (and of further inputs of the branches); they are removed.

    Raises:
        UnsupportedError: The branches are not as loracc puts them.
    """
    graph = model.graph
    branch = [node for node in graph if str(node.name).startswith(PREFIX)]
    mine = set(branch)
    for node in branch:
        through = {"Sub": 0, "Gemm": 2}.get(node.op_type)
        users = [user for user in node.outputs[0].uses() if user[0] not in mine]
        if through is None or not (users or node.outputs[0].is_graph_output()):
            continue
        end = node.inputs[through] if len(node.inputs) > through else None
        if end is None:
            raise UnsupportedError(f"node {node.name!r} is no end of a branch.")
        for user, index in users:
            user.replace_input_with(index, end)
        _swap_output(graph, node.outputs[0], end, f"{node.name}.gone")
    graph.remove(branch, safe=True)
    for name in (*parameters, *(str(name) for name in graph.initializers if str(name).startswith(PREFIX))):
        value = graph.initializers.pop(name, None)
        for index, given in enumerate(list(graph.inputs)):
            if given is value or given.name == name:
                del graph.inputs[index]
                break
