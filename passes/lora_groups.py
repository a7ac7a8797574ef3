"""Which terms of a sum are one linear map: the base weight, and the terms that are deltas on it.

Rules, for the terms ``Σ sᵢ·x·M₁…Mₙ`` of one source at one sum:

1. The base is a term of one factor that is an initializer. Of several, the first that has full rank.
2. A chain of factors with the base's head (same operation, same geometry) that is narrower inside than the weight is
   wide is a low-rank delta.
3. A single factor is a delta when it is computed from a low-rank product of weights, or is of deficient rank
   (a delta that an exporter multiplied out).
4. Whatever else reads the source stays as it is: two full-rank weights of one input are the model's own business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from loracc.passes.additive_trees import additive_tree, plain_weight, sources, weighted_nodes
from loracc.passes.constant_values import Constants
from loracc.passes.linear_forms import Factor, Form, NotLinear, Product
from loracc.passes.linear_reader import Reader
from loracc.passes.low_rank import has_full_rank, has_low_rank_product
from loracc.passes.value_dims import Dims

__all__ = ["Base", "Group", "find_group"]

Key = tuple[ir.Node, ...]


@dataclass(frozen=True)
class Base:
    """The weight that the deltas act on.

    Attributes:
        factor: Where it is read, and ``node`` the node that reads it.
        initializer: Where it is stored, and ``perm`` the permutation that the node sees it in.
        kind: A site's kind: "linear", "embedding", "conv".
    """

    factor: Factor
    initializer: ir.Value
    perm: tuple[int, ...]
    kind: str

    @property
    def node(self) -> ir.Node:
        """The node that multiplies by the weight."""
        return self.factor.node

    @property
    def key(self) -> Key:
        """How its term is known."""
        return (self.factor.node,)

    @property
    def layout(self) -> tuple[int, ...]:
        """The stored axis of each canonical axis."""
        if self.kind != "linear" or self.factor.turned:
            return self.perm
        return (self.perm[1], self.perm[0])


@dataclass(frozen=True)
class Group:
    """The terms of one source at one sum.

    Attributes:
        root: The sum.
        tree: The additions under it whose results go nowhere else.
        reader: Reads values as forms of the source.
        form: The sum's form.
        base: The weight.
        deltas: Keys of the terms that go.
    """

    root: ir.Node
    tree: frozenset[ir.Node]
    reader: Reader
    form: Form
    base: Base
    deltas: frozenset[Key]

    def without(self, node: ir.Node) -> Group | None:
        """The group in which the terms that a node is part of stay; None when no other delta is left."""
        staying = {product.key for product in self.form.products if node in product.key or node in self._nodes(product)}
        deltas = self.deltas - staying
        return replace(self, deltas=deltas) if deltas and deltas != self.deltas else None

    def _nodes(self, product: Product) -> frozenset[ir.Node]:
        """The nodes between a term's products, such as a scale."""
        last = product.factors[-1].node.outputs[0] if product.factors else None
        return self.reader.read(last).nodes if last is not None else frozenset()


def find_group(root: ir.Node, constants: Constants, dims: Dims) -> Group | None:
    """The first base weight under a sum that has deltas beside it."""
    weighted = weighted_nodes(root, constants)
    if len(weighted) < 2:
        return None
    tree = additive_tree(root, constants)
    seen: set[ir.Value] = set()
    for node, index in weighted:
        if _plain(node, index, constants) is None:
            continue
        for source in sources(node, index, constants, dims):
            if source not in seen:
                seen.add(source)
                group = _group(Reader(constants, dims, source, tree), root)
                if group is not None:
                    return group
    return None


def _group(reader: Reader, root: ir.Node) -> Group | None:
    try:
        form = reader.read(root.outputs[0])
    except NotLinear:
        return None
    terms = {product.key: product for product in form.products}
    base = _choose_base(terms, reader.constants)
    if base is None:
        return None
    head = terms[base.key].head
    deltas = frozenset(
        key
        for key, product in terms.items()
        if key not in ((), base.key) and product.head == head and _is_delta(product, reader.constants)
    )
    return Group(root, reader.tree, reader, form, base, deltas) if deltas else None


def _choose_base(terms: dict[Key, Product], constants: Constants) -> Base | None:
    """Rule 1."""
    single = [product for key, product in terms.items() if len(key) == 1 and _plain(*_at(product), constants)]
    if len(single) > 1:
        single = [product for product in single if has_full_rank(product.factors[0].read())] or single
    for product in single:
        found = _plain(*_at(product), constants)
        if found is not None and product.head is not None:
            return Base(product.factors[0], *found, kind=product.head.kind)
    return None


def _at(product: Product) -> tuple[ir.Node, int]:
    return product.factors[0].node, product.factors[0].index


def _plain(node: ir.Node, index: int, constants: Constants) -> tuple[ir.Value, tuple[int, ...]] | None:
    """A weight that a delta can be added to: a stored float tensor of the main graph that is nobody's output."""
    value = node.inputs[index]
    found = plain_weight(value) if value is not None else None
    if found is None or found[0].is_graph_output() or found[0].is_graph_input():
        return None
    return found


def _is_delta(product: Product, constants: Constants) -> bool:
    """Rules 2 and 3."""
    first, last = product.factors[0].shape[0], product.factors[-1].shape[1]
    if len(product.factors) > 1:
        return product.inner < max(first, last)
    factor = product.factors[0]
    return has_low_rank_product(factor.value, constants) or not has_full_rank(factor.read())
