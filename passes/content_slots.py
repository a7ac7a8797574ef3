"""What may be bound to a place: the readers of a stretch of an initializer, as what they read it, and where they stand.

One reader, or several that read the weight as the same thing, are one slot. Readers of different kinds (a tied
embedding's look-up and the head's product), or of different modules where the checkpoint has as many equal tensors (an
exporter keeps one of them), are slots of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from loracc.passes.content_places import Place
from loracc.passes.site_roles import Reader, Role, readers_of, role_of
from loracc.sites import Layout

__all__ = ["Slot", "node_positions", "slots_of"]


@dataclass(frozen=True)
class Slot:
    """A stretch of an initializer as some of its readers see it.

    Attributes:
        place: Where it is.
        kind: A site's kind; "other" when the readers tell nothing.
        layout: The stretch as a layout, None where the readers' "in" axis is cut: nothing can be bound there.
        consumer: As a site's.
        scopes: Module paths that its readers were traced in.
        partner: The node whose weight and bias belong together.
        order: Where its first reader stands in the graph.
    """

    place: Place
    kind: str
    layout: Layout | None
    consumer: str
    scopes: frozenset[str]
    partner: ir.Node | None
    order: int


def node_positions(model: ir.Model) -> dict[ir.Node, int]:
    """Where every node stands, subgraphs included; a graph's nodes are sorted."""
    return {node: index for index, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph))}


def slots_of(model: ir.Model, place: Place, names: int, positions: Mapping[ir.Node, int]) -> list[Slot]:
    """The slots of a place that is to hold this many parameters of the checkpoint, in the graph's order."""
    value = model.graph.initializers[place.initializer]
    readers = [(reader, role_of(reader)) for reader in readers_of(value, model.functions)]
    readers = [(reader, role) for reader, role in readers if role.kind != "other"] or readers
    groups: dict[tuple[object, ...], list[tuple[Reader, Role]]] = {}
    for reader, role in readers:
        groups.setdefault((role.kind, role.layout), []).append((reader, role))
    if len(groups) < names:
        groups = {}
        for reader, role in readers:
            groups.setdefault((reader.path[0] if reader.path else reader.node,), []).append((reader, role))
    every = [reader for reader, _ in readers]
    slots = [_slot(place, value, group, every if len(groups) > 1 else [], positions) for group in groups.values()]
    return sorted(slots, key=lambda slot: slot.order) or [_slot(place, value, [], [], positions)]


def _slot(
    place: Place,
    value: ir.Value,
    group: list[tuple[Reader, Role]],
    every: list[Reader],
    positions: Mapping[ir.Node, int],
) -> Slot:
    readers = [reader for reader, _ in group]
    role = group[0][1] if group else Role("other", "weight", Layout(), strong=False)
    rank = len(value.shape) if value.shape is not None else 0
    return Slot(
        place=place,
        kind=role.kind,
        layout=_layout(place, role, rank),
        consumer=_consumer(readers, every) if every else "",
        scopes=frozenset(reader.scope for reader in readers if reader.scope),
        partner=role.partner,
        order=min((positions.get(node, len(positions)) for r in readers for node in r.path), default=len(positions)),
    )


def _layout(place: Place, role: Role, rank: int) -> Layout | None:
    """A linear weight's readers know which axis is "out"; of anything else the stored axes are the canonical ones."""
    perm = role.layout.perm
    if role.kind == "other" and rank == 2:
        whole = next(c for c in place.candidates)
        perm = (1, 0) if whole.turned else ()
    if place.stop is None:
        return Layout(perm)
    return Layout(perm, place.start, place.stop) if (perm[0] if perm else 0) == place.axis else None


def _consumer(readers: list[Reader], every: list[Reader]) -> str:
    """The first node on the way to these readers that no other's way goes through."""
    shared = {node for other in every if other not in readers for node in other.path}
    path = readers[0].path
    return str(([node for node in path if node not in shared] or path[-1:])[0].name)
