"""What a weight is to the nodes that read it: the op, the operand, and which of its axes is "out".

Only use-def edges are looked at, never a weight's bytes. Between a weight and the node it matters to, Identity, Cast
among floats and Transpose are stepped through, and so are calls of the model's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.site_names import ParameterName, node_scope, parse_parameter
from loracc.sites import Layout

__all__ = ["Reader", "Role", "readers_of", "role_of"]


@dataclass(frozen=True)
class Reader:
    """A node that a weight arrives at.

    Attributes:
        node: The node, and ``index`` the input that the weight arrives at.
        path: The nodes from the initializer's direct user to ``node``.
        perm: The stored axis of each axis as the node sees it.
        name: The last parameter name on the way: the TorchScript exporter merges equal tensors and leaves each one's
            own name on an Identity's output.
        scope: Module path in whose forward the node was traced, None when nothing tells.
    """

    node: ir.Node
    index: int
    path: tuple[ir.Node, ...]
    perm: tuple[int, ...]
    name: ParameterName | None
    scope: str | None


@dataclass(frozen=True)
class Role:
    """What the weight is to a reader.

    Attributes:
        kind: A site's kind.
        parameter: What torch calls such an operand.
        layout: How the canonical weight lies in the stored one.
        partner: The node whose weight and bias belong together: the matrix product of a bias that a later Add brings.
        strong: An operand like this is a weight even when it has lost its name.
    """

    kind: str
    parameter: str
    layout: Layout
    partner: ir.Node | None = None
    strong: bool = True


#: Operands that mean one thing in every graph: op -> input -> (kind, parameter).
_OPERANDS: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "Conv": {1: ("conv", "weight"), 2: ("bias", "bias")},
    "FusedConv": {1: ("conv", "weight"), 2: ("bias", "bias")},
    "ConvTranspose": {1: ("conv_transpose", "weight"), 2: ("bias", "bias")},
    "LayerNormalization": {1: ("norm", "weight"), 2: ("norm", "bias")},
    "GroupNormalization": {1: ("norm", "weight"), 2: ("norm", "bias")},
    "RMSNormalization": {1: ("norm", "weight")},
    "SimplifiedLayerNormalization": {1: ("norm", "weight")},
    "SkipLayerNormalization": {2: ("norm", "weight"), 3: ("norm", "bias"), 4: ("bias", "bias")},
    "SkipSimplifiedLayerNormalization": {2: ("norm", "weight"), 3: ("bias", "bias")},
    "BatchNormalization": {
        1: ("norm", "weight"),
        2: ("norm", "bias"),
        3: ("other", "running_mean"),
        4: ("other", "running_var"),
    },
    "BiasGelu": {1: ("bias", "bias")},
    "FastGelu": {1: ("bias", "bias")},
    "BiasAdd": {1: ("bias", "bias")},
    "BiasSplitGelu": {1: ("bias", "bias")},
    "EmbedLayerNormalization": {
        2: ("embedding", "weight"),
        3: ("embedding", "weight"),
        4: ("embedding", "weight"),
        5: ("norm", "weight"),
        6: ("norm", "bias"),
    },
}
#: Matrix products: op -> (attribute that transposes input 0, the one that transposes input 1).
_PRODUCTS = {"MatMul": ("", ""), "Gemm": ("transA", "transB"), "FusedMatMul": ("transA", "transB")}
#: Nodes that ask for a weight's shape or dtype and not for its values.
_BLIND = {("Shape", 0), ("Size", 0), ("CastLike", 1)}
_STEPS = frozenset({"Identity", "Cast", "Transpose"})


def readers_of(value: ir.Value, functions: Mapping[ir.OperatorIdentifier, ir.Function]) -> Iterator[Reader]:
    """Every node that the weight's values arrive at, in the order of the uses."""
    rank = len(value.shape) if value.shape is not None else 0
    yield from _walk(value, (), tuple(range(rank)), parse_parameter(value.name), None, functions)


def _walk(
    value: ir.Value,
    path: tuple[ir.Node, ...],
    perm: tuple[int, ...],
    name: ParameterName | None,
    scope: str | None,
    functions: Mapping[ir.OperatorIdentifier, ir.Function],
) -> Iterator[Reader]:
    for node, index in value.uses():
        here = (*path, node)
        where = scope if (own := node_scope(node)) is None else own
        function = functions.get(node.op_identifier())
        if function is not None and node not in path and index < len(function.inputs):
            yield from _walk(function.inputs[index], here, perm, name, where, functions)
        elif _is_step(node, index):
            after = _permuted(perm, node) if node.op_type == "Transpose" else perm
            out = node.outputs[0]
            yield from _walk(out, here, after, parse_parameter(out.name) or name, scope, functions)
        elif (node.op_type, index) not in _BLIND:
            own_name = parse_parameter(value.name, node.op_type) or name
            yield Reader(node, index, here, perm, own_name, where)


def _is_step(node: ir.Node, index: int) -> bool:
    if node.op_type not in _STEPS or node.domain not in ("", "ai.onnx") or index != 0 or len(node.outputs) != 1:
        return False
    if node.op_type != "Cast":
        return True
    target = _int(node, "to", 0)
    return target in set(ir.DataType) and is_float(ir.DataType(target))


def _permuted(perm: tuple[int, ...], node: ir.Node) -> tuple[int, ...]:
    attribute = node.attributes.get("perm")
    if attribute is None:
        return tuple(reversed(perm))
    order = attribute.as_ints() if attribute.type == ir.AttributeType.INTS else ()
    if sorted(order) != list(range(len(perm))):
        return perm  # not a valid Transpose of this value; the checker of the graph says so, not the search for sites
    return tuple(perm[axis] for axis in order)


def role_of(reader: Reader) -> Role:
    """What the weight is to this reader; "other" where nothing more can be said."""
    node, index, rank = reader.node, reader.index, len(reader.perm)
    if node.op_type in _PRODUCTS:
        return _product_role(reader)
    if node.op_type == "Einsum":
        return _einsum_role(reader)
    if index == 0 and rank in (2, 3) and _takes_rows(node):
        kind = "embedding" if rank == 2 else "experts"
        return Role(kind, "weight", _layout(reader, range(rank)), strong=rank == 2)
    if node.op_type == "Attention" and node.domain == "com.microsoft" and index in (1, 2):
        return _fused_attention_role(reader)
    if node.op_type == "InstanceNormalization" and index in (1, 2):  # a decomposed GroupNorm has made-up ones here
        return Role("norm", "weight" if index == 1 else "bias", Layout(), strong=False)
    if index in _OPERANDS.get(node.op_type, {}):
        kind, parameter = _OPERANDS[node.op_type][index]
        return Role(kind, parameter, _layout(reader, range(rank)), partner=_operand_partner(node, kind))
    if rank == 1 and node.op_type == "Add" and (product := _product_before(node, index)):
        return Role("bias", "bias", Layout(), partner=product)
    if rank == 1 and node.op_type == "Mul":
        return Role("norm", "weight", Layout(), strong=False)
    return Role("other", "weight", Layout(), strong=False)


def _takes_rows(node: ir.Node) -> bool:
    """Whether input 0 is looked up by its first axis; torch's exporter writes ``stack[ids]`` as a GatherND."""
    if node.op_type == "GatherND":
        indices = node.inputs[1].shape if node.inputs[1] is not None else None
        last = indices[-1] if indices is not None and len(indices) else None
        return last == 1 and _int(node, "batch_dims", 0) == 0
    return node.op_type == "Gather" and _int(node, "axis", 0) == 0


def _product_role(reader: Reader) -> Role:
    """MatMul, Gemm: y = x·W has W as [in, out], y = W·x as [out, in]."""
    node, index, rank = reader.node, reader.index, len(reader.perm)
    if index == 2:
        return Role("bias", "bias", Layout(), partner=node) if rank == 1 else Role("other", "bias", Layout())
    if rank == 3:
        return Role("experts", "weight", Layout(), strong=False)
    if rank != 2:
        return Role("other", "weight", Layout(), strong=False)
    transpose = _PRODUCTS[node.op_type][index]
    transposed = bool(transpose and _int(node, transpose, 0))
    out_first = transposed == (index == 1)
    return Role("linear", "weight", _layout(reader, (0, 1) if out_first else (1, 0)), node, strong=index == 1)


def _einsum_role(reader: Reader) -> Role:
    """An operand of two letters, one of them contracted, is a linear weight; one of three is a stack of experts."""
    node, index, rank = reader.node, reader.index, len(reader.perm)
    if rank == 3:
        return Role("experts", "weight", Layout(), strong=False)
    attribute = node.attributes.get("equation")
    equation = attribute.as_string() if attribute is not None and attribute.type == ir.AttributeType.STRING else ""
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")[index] if index < terms.count(",") + 1 else ""
    kept = [axis for axis, letter in enumerate(letters) if letter in result]
    if rank != 2 or len(letters) != 2 or len(kept) != 1 or not result:
        return Role("other", "weight", Layout(), strong=False)
    return Role("linear", "weight", _layout(reader, (kept[0], 1 - kept[0])), node)


def _fused_attention_role(reader: Reader) -> Role:
    """onnxruntime's Attention: queries, keys and values side by side in one [in, 3·hidden] weight."""
    if reader.index == 2:
        return Role("bias", "bias", Layout(), partner=reader.node)
    return Role("linear", "weight", _layout(reader, (1, 0)), partner=reader.node)


def _operand_partner(node: ir.Node, kind: str) -> ir.Node | None:
    """The node that pairs a weight with its bias; None for operands that stand alone."""
    if node.op_type in ("BiasGelu", "FastGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        return _product_before(node, -1) if kind == "bias" else None
    return node


def _product_before(node: ir.Node, index: int) -> ir.Node | None:
    """The matrix product or convolution whose result ``node`` reads beside its input ``index``."""
    for other, value in enumerate(node.inputs):
        producer = value.producer() if value is not None and other != index else None
        while producer is not None and producer.op_type in ("Identity", "Cast") and producer.inputs[0] is not None:
            producer = producer.inputs[0].producer()
        if producer is not None and producer.op_type in (*_PRODUCTS, "Einsum", "Conv", "ConvTranspose"):
            return producer
    return None


def _int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute; the default where the graph gives it another type, which its checker says."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else default


def _layout(reader: Reader, canonical: Iterator[int] | range | tuple[int, ...]) -> Layout:
    """Canonical axes, given as axes that the node sees, as a layout of the stored tensor."""
    perm = tuple(reader.perm[axis] for axis in canonical)
    return Layout() if perm == tuple(range(len(perm))) else Layout(perm)
