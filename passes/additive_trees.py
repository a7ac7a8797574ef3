"""Where to look: trees of additions, the weighted nodes under them, and the sources those read."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.constant_values import Constants, element_type, is_onnx, plain_tensor
from loracc.passes.linear_reader import runs_in_training, swaps_last_two
from loracc.passes.value_dims import Dims

__all__ = ["SUMS", "WEIGHTS", "additive_tree", "is_additive", "is_sum", "plain_weight", "sources", "weighted_nodes"]

#: The nodes at which terms meet.
SUMS = frozenset({"Add", "Sub", "Sum"})
#: Operators that multiply by a weight, and which input it is (None: either).
WEIGHTS: dict[str, int | None] = {"MatMul": None, "Gemm": None, "Conv": 1, "Gather": 0}
_PASSING = frozenset({"Cast", "Dropout", "Identity", "Neg", "Reshape", "Transpose"})
#: How far below a sum its weights may lie.
_REACH = 48


def is_additive(node: ir.Node, constants: Constants) -> bool:
    """Whether the node's result is a sum of its operands times numbers that are known."""
    if not is_onnx(node):
        return False
    if node.op_type in ("Mul", "Div"):
        known = [constants.is_constant(v) for v in node.inputs]
        return known == [False, True] or (node.op_type == "Mul" and known == [True, False])
    return node.op_type in SUMS or node.op_type in ("Neg", "Cast", "Identity") or adds_value(node, constants)


def adds_value(node: ir.Node, constants: Constants) -> bool:
    """Whether the node is a Gemm that adds a runtime value to its product."""
    third = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    return third is not None and is_onnx(node) and not constants.is_constant(third)


def is_sum(node: ir.Node, constants: Constants) -> bool:
    """Whether terms meet at the node."""
    return is_onnx(node) and (node.op_type in SUMS or adds_value(node, constants))


def additive_tree(root: ir.Node, constants: Constants) -> set[ir.Node]:
    """The additions under ``root`` whose results go nowhere else."""
    tree = {root}
    frontier = _addends(root)
    grown = True
    while grown:
        grown = False
        for value in list(frontier):
            node = value.producer()
            if node in tree:
                continue
            if node is None or not is_additive(node, constants) or value.is_graph_output():
                continue
            if all(use.node in tree for use in value.uses()):
                tree.add(node)
                frontier |= _addends(node)
                grown = True
    return tree


def _addends(node: ir.Node) -> set[ir.Value]:
    inputs = node.inputs[2:] if node.op_type == "Gemm" else node.inputs
    return {value for value in inputs if value is not None}


def weighted_nodes(root: ir.Node, constants: Constants) -> list[tuple[ir.Node, int]]:
    """The nodes nearest under ``root`` that multiply something by a constant, with the constant's input index."""
    found: dict[ir.Node, int] = {}
    seen: set[ir.Node] = set()
    stack = [root]
    while stack and len(seen) < _REACH:
        node = stack.pop()
        if node in seen or not is_onnx(node):
            continue
        seen.add(node)
        index = weight_index(node, constants)
        if index is not None:
            found[node] = index
            if adds_value(node, constants):
                stack.extend(p for v in node.inputs[2:] if v is not None and (p := v.producer()) is not None)
        elif node is root or is_additive(node, constants) or node.op_type in _PASSING:
            stack.extend(p for v in reversed(node.inputs) if v is not None and (p := v.producer()) is not None)
    return list(found.items())


def weight_index(node: ir.Node, constants: Constants) -> int | None:
    """Which input of a product is its weight: the constant one, where the other is not."""
    if node.op_type not in WEIGHTS or not is_onnx(node) or len(node.inputs) < 2:
        return None
    known = [constants.is_constant(v) for v in node.inputs[:2]]
    if known[0] == known[1]:
        return None
    index = 0 if known[0] else 1
    return index if WEIGHTS[node.op_type] in (None, index) else None


def sources(node: ir.Node, weight: int, constants: Constants, dims: Dims) -> Iterator[ir.Value]:
    """What a weighted node may be said to read: its operand, and what that only retypes, turns or reshapes.

    The farthest first, since that is what all terms of a sum have in common.
    """
    value = node.inputs[1 - weight]
    chain: list[ir.Value] = []
    while value is not None:
        chain.append(value)
        value = _passed_on(value, constants, dims)
    yield from reversed(chain)


def _passed_on(value: ir.Value, constants: Constants, dims: Dims) -> ir.Value | None:
    node = value.producer()
    if node is None or not is_onnx(node) or value is not node.outputs[0]:
        return None
    before = node.inputs[0] if node.inputs else None
    if before is None:
        return None
    if node.op_type == "Identity" or (node.op_type == "Dropout" and not runs_in_training(node, constants)):
        return before
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        held = element_type(before)
        alike = held is not None and is_float(held) == is_float(to)
        return before if alike else None
    if node.op_type == "Transpose":
        return before if swaps_last_two(node, dims) else None
    if node.op_type == "Reshape":
        old, new = dims.of(before), dims.of(value)
        return before if old and new and old[-1] == new[-1] else None
    return None


def plain_weight(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The initializer that a weight is, and the permutation that makes it so; None for a computed one.

    Casts among floats and Transposes are stepped through: what they do is no arithmetic.
    """
    tensor_rank = len(value.shape) if value.shape is not None else None
    steps: list[tuple[int, ...] | None] = []
    current = value
    while not current.is_initializer():
        node = current.producer()
        if node is None or not is_onnx(node) or node.op_type not in ("Cast", "Identity", "Transpose"):
            return None
        if node.op_type == "Transpose":
            order = node.attributes.get("perm")
            steps.append(None if order is None else tuple(order.as_ints()))
        if node.inputs[0] is None:
            return None
        current = node.inputs[0]
    tensor = plain_tensor(current)
    if tensor is None or not is_float(tensor.dtype):
        return None
    rank = len(tensor.shape)
    assert tensor_rank is None or tensor_rank == rank
    perm = tuple(range(rank))
    for step in reversed(steps):
        perm = tuple(perm[axis] for axis in (step if step is not None else reversed(range(rank))))
    return current, perm
