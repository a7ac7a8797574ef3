"""Deltas that were found in a graph get their sites, by the names that the raised graph has.

A weight may be read several times: by one module that is called twice, or by two that are tied. Deltas that every
reader has alike are bound once; where readers differ, each binding says which node it means, and ``UnsharePass`` gives
it a weight of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.folded import Binding
from loracc.passes.find_sites import find_sites
from loracc.sites import Layout, Site

__all__ = ["Found", "bind_found"]

_VIEWS = frozenset({"Cast", "Identity", "Transpose"})


@dataclass(frozen=True)
class Found:
    """A delta whose site has no name yet.

    Attributes:
        initializer: The weight, or the bias.
        layout: The stored axis of each canonical axis.
        kind: A site's kind.
        delta: The change.
        adapter: The adapter's name as its parameters tell it, else "graph".
        node: The node that reads the weight.
    """

    initializer: ir.Value
    layout: tuple[int, ...]
    kind: str
    delta: Delta
    adapter: str
    node: ir.Node


def bind_found(model: ir.Model, found: Sequence[Found]) -> list[Binding]:
    """Bindings for everything found, weight by weight in the order of the first finding."""
    if not found:
        return []
    table = list(find_sites(model))
    bindings: list[Binding] = []
    for value in dict.fromkeys(item.initializer for item in found):
        items = [item for item in found if item.initializer is value]
        sites = [site for site in table if site.initializer == value.name]
        bindings += _bind(model, value, items, sites)
    return bindings


def _bind(model: ir.Model, value: ir.Value, items: Sequence[Found], sites: Sequence[Site]) -> list[Binding]:
    by_node: dict[ir.Node, list[Found]] = {}
    for item in items:
        by_node.setdefault(item.node, []).append(item)
    first = next(iter(by_node.values()))
    alike = set(_readers(value)) == set(by_node) and all(_same(first, other) for other in by_node.values())
    bindings: list[Binding] = []
    bound: set[Site] = set()
    for node, own in by_node.items():
        site = _site(own[0], sites)
        if not site.consumer and not alike:
            node.name = node.name or _free_name(model)
            site = replace(site, consumer=str(node.name))
        if site not in bound:
            bound.add(site)
            bindings += [Binding(site, item.delta, item.adapter, site.name, "graph") for item in own]
    return bindings


def _readers(value: ir.Value) -> Iterable[ir.Node]:
    for use in value.uses():
        if use.node.op_type in _VIEWS:
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _same(one: Sequence[Found], other: Sequence[Found]) -> bool:
    """Equal tensor for tensor."""
    return len(one) == len(other) and all(
        a.layout == b.layout and (a.delta is b.delta or _equal(a.delta, b.delta))
        for a, b in zip(one, other, strict=True)
    )


def _equal(one: Delta, other: Delta) -> bool:
    mine, theirs = one.arrays(), other.arrays()
    if type(one) is not type(other) or one.scale != other.scale or mine.keys() != theirs.keys():
        return False
    return all(np.array_equal(mine[role], theirs[role]) for role in mine)


def _free_name(model: ir.Model) -> str:
    taken = {node.name for node in model.graph.all_nodes()}
    return next(name for i in range(len(taken) + 1) if (name := f"raised_{i}") not in taken)


def _site(item: Found, sites: Sequence[Site]) -> Site:
    """The site that the graph's own names make of it, else one that its initializer's name makes."""
    identity = item.layout == tuple(range(len(item.layout)))
    layout = Layout() if identity else Layout(item.layout)
    fitting = [site for site in sites if site.layout == layout and site.kind in (item.kind, "other")]
    named = [site for site in fitting if site.consumer == item.node.name] or [s for s in fitting if not s.consumer]
    if named:
        return named[0]
    name = str(item.initializer.name)
    module, dot, parameter = name.rpartition(".")
    known = bool(dot) and parameter in ("weight", "bias")
    return Site(
        module if known else "",
        parameter if known else "weight",
        item.kind,
        name,
        layout,
        source="name" if known else "",
    )
