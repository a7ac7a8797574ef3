"""What looks like LoRA and is none: found by shape, told with its reason, and left alone.

The shape: something is added to a term that goes down to fewer channels by one weight and up again by another, with
nothing but elementwise operators of one input, and products, between and after them. Everything linear of that shape
beside a weight of the same input has been raised before; what is still there has a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from loracc.passes.additive_trees import WEIGHTS, additive_tree, is_sum, plain_weight, sources, weighted_nodes
from loracc.passes.constant_values import Constants, is_onnx
from loracc.passes.linear_forms import NotLinear
from loracc.passes.linear_reader import Reader
from loracc.passes.raised import Rejected
from loracc.passes.site_names import node_scope
from loracc.passes.value_dims import Dims

__all__ = ["find_lookalikes", "place"]

#: Elementwise nodes that may lie between the two weights of a look-alike.
_BETWEEN = 12


def place(node: ir.Node) -> str:
    """A node as a user finds it again."""
    scope = node_scope(node)
    return f"{node.op_type} {node.name!r}" + (f" in {scope}" if scope else "")


def find_lookalikes(model: ir.Model, constants: Constants, dims: Dims, skip: Collection[ir.Node]) -> list[Rejected]:
    """Every remaining look-alike of a model, in graph order; ``skip`` has been reported."""
    inner: set[ir.Node] = set()
    found = []
    for node in reversed(list(model.graph.all_nodes())):
        if not is_sum(node, constants) or node in inner or constants.is_constant(node.outputs[0]):
            continue
        tree = additive_tree(node, constants)
        inner |= tree
        if not tree & set(skip):
            found += [Rejected(place(node), reason) for reason in _reasons(node, tree, constants, dims)]
    return found[::-1]


def _reasons(root: ir.Node, tree: set[ir.Node], constants: Constants, dims: Dims) -> Iterator[str]:
    operands = (v for node in tree for v in node.inputs if v is not None and v.producer() not in tree)
    leaves = {v for v in operands if not constants.is_constant(v)}
    for leaf in sorted(leaves if len(leaves) > 1 else (), key=lambda v: str(v.name)):
        ends = _down_and_up(leaf, constants)
        if ends is not None:
            yield _reason(root, leaf, ends[0], tree, constants, dims)


def _down_and_up(leaf: ir.Value, constants: Constants) -> tuple[ir.Node, ir.Node] | None:
    """The two products of a look-alike, by walking down from its result."""
    for up in _products_below(leaf, constants):
        operand = up.inputs[1 - _weight_at(up, constants)]
        if operand is None:
            continue
        for down in _products_below(operand, constants):
            if down is not up and _narrows(down, up, constants):
                return down, up
    return None


def _products_below(value: ir.Value, constants: Constants) -> Iterator[ir.Node]:
    """The nearest products with a weight under a value, through elementwise operators."""
    seen: set[ir.Node] = set()
    stack = [value]
    while stack and len(seen) < _BETWEEN:
        node = stack.pop().producer()
        if node is None or node in seen or constants.is_constant(node.outputs[0]):
            continue
        seen.add(node)
        if node.op_type in WEIGHTS and is_onnx(node):
            if _weight_at(node, constants) >= 0:
                yield node
        elif node.op_type not in _MIXING:
            operands = [v for v in reversed(node.inputs) if v is not None and not constants.is_constant(v)]
            if len(operands) == 1 or node.op_type in ("Mul", "Div"):
                stack.extend(operands)


#: Operators that are no elementwise step: what is below them is another matter.
_MIXING = frozenset(
    {"Concat", "Split", "Slice", "AveragePool", "MaxPool", "GlobalAveragePool", "ReduceMean", "ReduceSum"}
    | {"Attention", "MultiHeadAttention", "Einsum", "LSTM", "GRU", "RNN", "Scan", "Loop", "If", "GatherElements"}
)


def _weight_at(node: ir.Node, constants: Constants) -> int:
    """The input that is a weight, stored or the caller's; -1 where both are activations."""
    order = (0,) if node.op_type == "Gather" else (1, 0) if node.op_type != "Conv" else (1,)
    for index in order:
        value = node.inputs[index]
        other = node.inputs[1 - index]
        if (
            value is not None
            and other is not None
            and not constants.is_constant(other)
            and _is_weight(value, constants)
        ):
            return index
    return -1


def _is_weight(value: ir.Value, constants: Constants) -> bool:
    shape = value.shape
    if constants.is_constant(value):
        return len(constants.shape(value)) >= 2
    return value.is_graph_input() and (value.is_initializer() or (shape is not None and len(shape) == 2))


def _narrows(down: ir.Node, up: ir.Node, constants: Constants) -> bool:
    """Whether the width between two products is smaller than on either side; unknown widths do."""
    first, last = _widths(down, constants), _widths(up, constants)
    if first is None or last is None:
        return True
    return first[1] == last[0] and first[1] < first[0] and last[0] < last[1]


def _widths(node: ir.Node, constants: Constants) -> tuple[int, int] | None:
    """(inputs, outputs) of a product's weight."""
    index = _weight_at(node, constants)
    value = node.inputs[index]
    assert value is not None
    if not constants.is_constant(value) and (value.shape is None or not value.shape.is_static()):
        return None
    shape = (
        constants.shape(value) if constants.is_constant(value) else tuple(value.shape.numpy() if value.shape else ())
    )
    if node.op_type == "Conv":
        return shape[1], shape[0]
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int(("transA", "transB")[index], 0))
    rows, columns = shape[-2:]
    return (columns, rows) if turned == (index == 1) and node.op_type != "Gather" else (rows, columns)


def _reason(root: ir.Node, leaf: ir.Value, down: ir.Node, tree: set[ir.Node], constants: Constants, dims: Dims) -> str:
    weight = _weight_at(down, constants)
    own = list(sources(down, weight, constants, dims))
    try:
        Reader(constants, dims, own[0]).read(leaf)
    except NotLinear as reason:
        return str(reason)
    bases = [(n, i) for n, i in weighted_nodes(root, constants) if n is not down and n not in _below(leaf)]
    if not bases:
        return _without_base(tree, leaf, own)
    for node, index in bases:
        value = node.inputs[index]
        plain = plain_weight(value) if value is not None else None
        if plain is None or plain[0].is_graph_output():
            return (
                f"the weight {value.name if value else ''!r} beside it is computed in the graph or is an output of it"
            )
        reads = list(sources(node, index, constants, dims))
        if not set(reads) & set(own):
            where = f"it reads {own[0].name!r}, and the weight {plain[0].name!r} beside it reads {reads[0].name!r}"
            try:
                Reader(constants, dims, reads[0]).read(leaf)
            except NotLinear as reason:
                return f"{where}: {reason}"
            return where
    return _mismatch(root, leaf, bases, tree, constants, dims)


def _mismatch(
    root: ir.Node,
    leaf: ir.Value,
    bases: list[tuple[ir.Node, int]],
    tree: set[ir.Node],
    constants: Constants,
    dims: Dims,
) -> str:
    """Same input, linear, and still no delta: operations, geometries or shapes differ."""
    node, index = bases[0]
    for source in sources(node, index, constants, dims):
        try:
            form = Reader(constants, dims, source, tree).read(root.outputs[0])
        except NotLinear as reason:
            return str(reason)
        told = next((text for value, text in form.opaque if value is leaf), None)
        if told is not None:
            return told
        heads = {p.head for p in form.products}
        if len(heads) > 1:
            return "it is another operation than the base's: " + " and ".join(sorted(str(h) for h in heads))
    return "it is not narrower inside than the weight beside it"


def _without_base(tree: set[ir.Node], leaf: ir.Value, own: Sequence[ir.Value]) -> str:
    for node in tree:
        for value in node.inputs:
            producer = value.producer() if value is not None and value is not leaf else None
            for operand in producer.inputs if producer is not None and producer.op_type in WEIGHTS else ():
                if operand is not None and operand.is_graph_input() and operand not in own and producer is not None:
                    return f"the base weight may be {operand.name!r}, which is a graph input"
    return "no weight of the same input is beside it"


def _below(leaf: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    stack = [leaf]
    while stack and len(found) < 64:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(v for v in node.inputs if v is not None)
    return found
