"""A weight that the graph computes as ``W + s·B·A`` before it uses it (loralib's convolutions, parametrizations).

The stored tensor W among the addends is the base. A change ``s·B·A`` of it, at most turned and reshaped, is low-rank;
any other way in which the expression uses W and a low-rank product is evaluated and written out as W' − W. Expressions
without a low-rank product in them (weight normalisation) are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.passes.additive_trees import plain_weight, weight_index
from loracc.passes.constant_values import Constants, plain_tensor
from loracc.passes.low_rank import has_low_rank_product
from loracc.passes.peft_names import adapter_name
from loracc.passes.raised import RaisedAddition
from loracc.passes.raised_deltas import narrowed
from loracc.passes.rewrite_sums import drop_dead
from loracc.tensors import PermutedTensor, dims

__all__ = ["RaisedWeight", "raise_weight"]

_ARITHMETIC = frozenset({"Add", "Sub", "Sum", "Mul", "Div", "Cast", "Identity", "Transpose", "Neg"})


@dataclass(frozen=True)
class RaisedWeight:
    """A delta found in a weight's expression; the attributes are those of ``raised_sites.Found``."""

    node: ir.Node
    initializer: ir.Value
    layout: tuple[int, ...]
    kind: str
    delta: Delta
    adapter: str


def raise_weight(node: ir.Node, graph: ir.Graph, constants: Constants) -> Iterator[RaisedWeight]:
    """The delta in the weight of one node; the node then reads the stored weight."""
    index = weight_index(node, constants)
    value = node.inputs[index] if index is not None else None
    if index is None or value is None or plain_weight(value) is not None or node.graph is None:
        return
    found = _base(value, constants)
    if found is None or not has_low_rank_product(value, constants):
        return
    stored, perm = found
    whole = constants.evaluate(value)
    change = whole - constants.evaluate(stored).transpose(perm)
    producer = value.producer()
    assert producer is not None
    names = list(_names(value))
    turn = _canonical_axes(node, index, len(perm))
    delta = _as_product(producer, change, turn, constants) or RaisedAddition(narrowed(change.transpose(turn)))
    readers = [use.node for use in value.uses()]
    _read_stored(graph, producer, value, stored, perm)
    drop_dead(graph, [producer])
    layout = _layout(stored, perm, turn, readers)
    for reader in dict.fromkeys(readers):
        yield RaisedWeight(reader, stored, layout, _kind(node), delta, adapter_name(names))


def _base(value: ir.Value, constants: Constants) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The one stored tensor of the expression's size that is an addend of it, and how it is turned on the way."""
    shape = constants.shape(value)
    found: list[tuple[ir.Value, tuple[int, ...]]] = []
    stack = [(value, tuple(range(len(shape))))]
    seen: set[ir.Value] = set()
    sums = False
    while stack:
        current, perm = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_initializer():
            tensor = plain_tensor(current)
            fits = tensor is not None and len(dims(tensor)) == len(shape) and not current.is_graph_output()
            if fits and tensor is not None and tuple(dims(tensor)[axis] for axis in perm) == shape:
                found.append((current, perm))
            continue
        node = current.producer()
        if node is None or node.op_type not in _ARITHMETIC:
            continue
        sums |= node.op_type in ("Add", "Sub", "Sum")
        after = _through(perm, node)
        stack.extend((v, after) for v in node.inputs if v is not None)
    return found[0] if sums and len(found) == 1 else None


def _through(perm: tuple[int, ...], node: ir.Node) -> tuple[int, ...]:
    """``y = x.transpose(step)`` and ``z = y.transpose(perm)``: the permutation from x to z."""
    if node.op_type != "Transpose":
        return perm
    attribute = node.attributes.get("perm")
    step = tuple(attribute.as_ints()) if attribute is not None else tuple(reversed(range(len(perm))))
    return tuple(step[axis] for axis in perm)


def _as_product(top: ir.Node, change: Array, turn: tuple[int, ...], constants: Constants) -> LowRank | None:
    """The change as s·B·A, where the expression has these two: told by comparing the numbers."""
    canonical = change.transpose(turn)
    rows = canonical.shape[0]
    flat = canonical.reshape(rows, -1)
    for node in _products(top):
        left, right = (constants.evaluate(v) for v in node.inputs[:2] if v is not None)
        if node.op_type == "Gemm":
            left = left.T if node.attributes.get_int("transA", 0) else left
            right = right.T if node.attributes.get_int("transB", 0) else right
        if left.ndim != 2 or right.ndim != 2:
            continue
        for b, a in ((left, right), (right.T, left.T)):
            if (b.shape[0], a.shape[1]) != flat.shape:
                continue
            product = b @ a
            scale = _ratio(flat, product)
            if scale is not None:
                return LowRank(narrowed(a.reshape(-1, *canonical.shape[1:])), narrowed(b), scale)
    return None


def _products(top: ir.Node) -> Iterator[ir.Node]:
    seen: set[ir.Node] = set()
    stack = [top]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type in ("MatMul", "Gemm"):
            yield node
        stack.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)


def _ratio(change: Array, product: Array) -> float | None:
    """s with change = s·product, None where there is none. Both carry the rounding of W + s·B·A − W in float64."""
    square = float(np.vdot(product, product))
    if square == 0.0:
        return None
    scale = float(np.vdot(product, change)) / square
    rounded = float(np.float32(scale))
    scale = rounded if abs(rounded - scale) <= 1e-9 * abs(scale) else scale
    close = np.abs(change - scale * product).max() <= 1e-9 * max(float(np.abs(change).max()), 1e-300)
    return scale if close else None


def _read_stored(graph: ir.Graph, producer: ir.Node, value: ir.Value, stored: ir.Value, perm: tuple[int, ...]) -> None:
    """The readers of the expression read the stored weight; it is stored turned where they want it so."""
    if perm == tuple(range(len(perm))):
        value.replace_all_uses_with(stored)
        return
    node = ir.node("Transpose", [stored], {"perm": list(perm)})
    assert isinstance(producer.graph, ir.Graph)
    producer.graph.insert_before(producer, node)
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{stored.name}.turned", value.type, value.shape
    value.replace_all_uses_with(out)
    drop_dead(graph, [producer])
    if len(stored.uses()) == 1 and stored.const_value is not None:
        out.replace_all_uses_with(stored)
        producer_graph = node.graph
        assert producer_graph is not None
        producer_graph.remove(node, safe=True)
        stored.const_value = PermutedTensor(stored.const_value, perm, stored.name)
        stored.shape = ir.Shape(dims(stored.const_value))


def _layout(
    stored: ir.Value, perm: tuple[int, ...], turn: tuple[int, ...], readers: Sequence[ir.Node]
) -> tuple[int, ...]:
    """The stored axis of each canonical axis, after what ``_read_stored`` did."""
    direct = any(value is stored for reader in readers for value in reader.inputs)
    return turn if direct else tuple(perm[axis] for axis in turn)


def _canonical_axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...]:
    """The axis, as the node sees it, of each canonical axis."""
    if node.op_type not in ("MatMul", "Gemm") or rank != 2:
        return tuple(range(rank))
    attribute = ("transA", "transB")[index]
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int(attribute, 0))
    return (0, 1) if turned == (index == 1) else (1, 0)


def _kind(node: ir.Node) -> str:
    return {"Conv": "conv", "Gather": "embedding"}.get(node.op_type, "linear")


def _names(value: ir.Value) -> Iterator[str]:
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            yield str(current.name)
        else:
            stack.extend(v for v in node.inputs if v is not None)
