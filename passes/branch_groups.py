"""Which sites share a branch: the fewest products that serve all of them.

Sites that read the same value (q, k and v; gate and up) share one product with A, whose columns are the ranks of all of
them side by side. Sites that lie in one weight (fused QKV) share the product with B too: it has a block of rows a rank
and a block of columns a site.

    t  = x · [A_q | A_k | A_v]                       one product
    q += t · [B_q; 0; 0],  k += t · [0; B_k; 0], ... one product a weight, zero rows where another site's ranks are
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.passes.delta_points import Point
from loracc.sites import Site

__all__ = ["Group", "Up", "branch_groups"]


@dataclass(frozen=True)
class Up:
    """One weight of a group.

    Attributes:
        name: What its B is named after: the module, or the weight of several.
        sites: The sites in the weight.
        nodes: What multiplies with it, one node a call of the module.
        out: Columns of its product.
    """

    name: str
    sites: tuple[Site, ...]
    nodes: tuple[ir.Node, ...]
    out: int


@dataclass(frozen=True)
class Group:
    """Sites that read the same values.

    Attributes:
        name: What its A is named after.
        gathers: Its sites are embeddings: A is looked up, not multiplied.
        xs: What they read, one value a call.
        ups: Its weights, in the graph's order.
        dtype: Of the products.
        features: Length of what is read.
    """

    name: str
    gathers: bool
    xs: tuple[ir.Value, ...]
    ups: tuple[Up, ...]
    dtype: ir.DataType
    features: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """All its sites; the ranks lie side by side in this order."""
        return tuple(site for up in self.ups for site in up.sites)


def branch_groups(points: Mapping[Site, Sequence[Point]]) -> list[Group]:
    """Group the sites by what they read, in their order.

    Args:
        points: Where each site's delta enters (:func:`loracc.passes.delta_points.delta_points`).
    """
    by_read: dict[tuple[object, ...], list[Site]] = {}
    for site, found in points.items():
        gathers = found[0].node.op_type == "Gather"
        key = (gathers, found[0].dtype, found[0].features[0], *(point.x for point in found))
        by_read.setdefault((*key, site.initializer) if gathers else key, []).append(site)
    return [_group(sites, points) for sites in by_read.values()]


def _group(sites: Sequence[Site], points: Mapping[Site, Sequence[Point]]) -> Group:
    by_weight: dict[tuple[ir.Node, ...], list[Site]] = {}
    for site in sites:
        by_weight.setdefault(tuple(point.node for point in points[site]), []).append(site)
    ups = []
    for nodes, inside in by_weight.items():
        inside.sort(key=lambda site: site.layout.start)
        ups.append(Up(joined_name(inside), tuple(inside), nodes, points[inside[0]][0].features[1]))
    first = points[sites[0]]
    name = joined_name([site for up in ups for site in up.sites])
    gathers = first[0].node.op_type == "Gather"
    return Group(name, gathers, tuple(point.x for point in first), tuple(ups), first[0].dtype, first[0].features[0])


def joined_name(sites: Sequence[Site]) -> str:
    """One name for several sites: what they have in common once, then what they have not.

    >>> joined_name([Site(f"layers.0.attn.{n}_proj", "weight", "linear", "") for n in "qkv"])
    'layers.0.attn.q_proj+k_proj+v_proj'
    """
    names = [site.module if site.parameter == "weight" and site.module else site.name for site in sites]
    if len(set(names)) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    alike = next(
        (i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)) - 1
    )
    own = "+".join(".".join(path[alike:]) for path in parts)
    return ".".join([*parts[0][:alike], own])
