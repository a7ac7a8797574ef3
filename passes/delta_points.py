"""Where a low-rank delta enters a graph that keeps it beside its weight: y = x·W becomes y = x·W + (x·A)·B.

Every reader of a site's weight is one :class:`Point`. What has no such branch is refused with its reason: an
:class:`~loracc.errors.UnsupportedError` that says which way of serving the adapter is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.deltas import LowRank
from loracc.errors import LoraccError, UnsupportedError, combined
from loracc.folded import Binding
from loracc.passes.site_roles import Reader, readers_of
from loracc.sites import Site

__all__ = ["VARIANTS_HINT", "Point", "delta_points", "refuse_other_kinds"]

#: The mode that takes every kind.
VARIANTS_HINT = (
    "Attach it as variants (--as variants), which switches whole weights and takes every kind, or fold it: loracc fold."
)
_DTYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
#: The weight's input, and the axis of it that is summed over (for a Gather, the one that is looked up).
_PRODUCTS: Mapping[str, tuple[int, int]] = {"MatMul": (1, 0), "Gemm": (1, 0), "Gather": (0, 0)}


@dataclass(frozen=True)
class Point:
    """One reader of a weight.

    Attributes:
        site: Whose weight it is.
        node: MatMul, Gemm or Gather, in the main graph.
        x: What the product reads beside the weight: activations ``[..., in]``, or indices of a Gather.
        dtype: Of the product.
        features: (in, out) of the whole weight as this node multiplies with it; out counts a fused weight's blocks too.
    """

    site: Site
    node: ir.Node
    x: ir.Value
    dtype: ir.DataType
    features: tuple[int, int]

    @property
    def y(self) -> ir.Value:
        """The product."""
        return self.node.outputs[0]


def refuse_other_kinds(bindings: Sequence[Binding]) -> None:
    """Raise where a delta is not of low rank.

    Raises:
        UnsupportedError: Names each kind and the sites it is at.
    """
    others: dict[str, list[str]] = {}
    for binding in bindings:
        if not isinstance(binding.delta, LowRank):
            others.setdefault(f"adapter {binding.adapter!r}: {binding.delta.kind}", []).append(binding.site.name)
    if others:
        lines = [f"{what} at {len(sites)} site(s), the first {sites[0]}" for what, sites in others.items()]
        raise UnsupportedError(
            "only plain low-rank deltas (s·B·A beside a weight) can stay in a graph as a branch, and this is not:\n"
            + "\n".join(lines),
            hint=VARIANTS_HINT,
        )


def delta_points(model: ir.Model, sites: Sequence[Site]) -> dict[Site, tuple[Point, ...]]:
    """The points of each site, in the order of its weight's readers.

    Raises:
        UnsupportedError: A site has no branch: the weight is read by an operator without a rule, in a subgraph or a
            function, the wrong way round, or is a graph output; all of them at once.
    """
    found: dict[Site, tuple[Point, ...]] = {}
    errors: list[LoraccError] = []
    for site in sites:
        try:
            found[site] = _points(model, site)
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return found


def _points(model: ir.Model, site: Site) -> tuple[Point, ...]:
    value = model.graph.initializers[site.initializer]
    if value.is_graph_output():
        raise _refusal(site, "the weight is an output of the graph")
    readers = [
        reader
        for reader in readers_of(value, model.functions)
        if not site.consumer or site.consumer in {str(node.name) for node in reader.path}
    ]
    if not readers:
        raise _refusal(site, "nothing reads the weight")
    return tuple(_point(model, site, value, reader) for reader in readers)


def _point(model: ir.Model, site: Site, value: ir.Value, reader: Reader) -> Point:
    node = reader.node
    if any(step.graph is not model.graph for step in reader.path):
        raise _refusal(site, f"node {node.name!r} reads the weight inside a function or a branch of the graph")
    index, axis = _PRODUCTS.get(node.op_type, (-1, 0))
    if node.domain not in ("", "ai.onnx") or reader.index != index or len(reader.perm) != 2:
        raise _refusal(site, f"node {node.name!r} is {_label(node)} with the weight as input {reader.index}")
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        raise _refusal(site, f"node {node.name!r} gathers along another axis than the rows")
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        axis = 1
    stored = value.shape.numpy() if value.shape is not None else ()
    seen = tuple(int(stored[i]) for i in reader.perm)
    perm = site.layout.perm or (0, 1)
    if reader.perm[axis] != perm[0 if node.op_type == "Gather" else 1]:
        raise _refusal(site, f"node {node.name!r} reads the weight the other way round than the site's record says")
    if node.op_type == "Gather" and not site.layout.whole:
        raise _refusal(site, "an embedding that is a block of another weight has no branch rule")
    weight, x = node.inputs[index], node.inputs[1 - index]
    assert weight is not None and x is not None
    dtype = weight.dtype or value.dtype
    if dtype not in _DTYPES:
        raise _refusal(site, f"node {node.name!r} multiplies in {dtype}")
    return Point(site, node, x, dtype, (seen[axis], seen[1 - axis]))


def _label(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _refusal(site: Site, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{site.name}: no branch can stand beside this weight: {reason}.", hint=VARIANTS_HINT)
