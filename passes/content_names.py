"""Which of several equal parameters is which of several equal weights.

Fresh norms and biases, copied layers and tied weights have the same values. Each rule leaves a slot fewer names; what
is decided decides more:

1. a site of that name is there already (recorded, by name, by scope);
2. the slot's readers were traced in the name's module, and in no other's;
3. a bias belongs to the module of the weight that it is added to the product of;
4. a head that is tied to an embedding is multiplied with, the embedding is not;
5. position: the names differ in a layer's number only, there are as many slots, and the numbers rise along the graph as
   they do for all that is decided.

What is left is ambiguous, and an error for whoever wants to bind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.passes.content_slots import Slot
from loracc.passes.site_names import related
from loracc.sites import Site

__all__ = ["Settled", "assign"]

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Settled:
    """What is known from elsewhere.

    Attributes:
        modules: (partner node, start, stop) of the weights whose module is known.
        anchors: (name, order) of what is decided.
    """

    modules: Mapping[tuple[ir.Node, int, int | None], str]
    anchors: Sequence[tuple[str, int]]


def assign(
    names: Sequence[Site], slots: Sequence[Slot], settled: Settled
) -> tuple[list[tuple[Site, Slot]], list[Site]]:
    """Pairs that are certain, and the parameters that might be several slots.

    Args:
        names: The checkpoint's sites with equal tensors.
        slots: Where the graph has these values.
        settled: What is known from elsewhere.
    """
    left, free, pairs = list(names), list(slots), []
    options: dict[int, list[Site]] = {id(slot): _allowed(slot, names, slots, settled) for slot in slots}
    while found := _certain(left, free, options) or _in_order(left, free, options, settled):
        pairs += found
        for name, slot in found:
            left.remove(name)
            free = [other for other in free if other is not slot]
    return pairs, left


def _allowed(slot: Slot, names: Sequence[Site], slots: Sequence[Slot], settled: Settled) -> list[Site]:
    rules: tuple[Callable[[Site], bool], ...] = (
        lambda name: bool(slot.scopes) and all(related(name.module, scope) for scope in slot.scopes),
        lambda name: _partner_module(slot, settled) == name.module,
    )
    left = list(names)
    for rule in rules:
        left = [name for name in left if rule(name)] or left
    kinds = {other.kind for other in slots}
    if slot.kind in ("embedding", "linear") and {"embedding", "linear"} <= kinds:
        left = [name for name in left if _tied_as(name, names) in (slot.kind, None)]
    return left


def _tied_as(name: Site, names: Sequence[Site]) -> str | None:
    """Which reader of a tied weight a name is; None where the checkpoint does not say. Of a lone name, the look-up."""
    if len(names) == 1:
        return "embedding"
    told = any(other.kind == "linear" for other in names)
    return ("linear" if name.kind == "linear" else "embedding") if told else None


def _partner_module(slot: Slot, settled: Settled) -> str | None:
    if slot.partner is None or slot.kind != "bias":
        return None
    return settled.modules.get((slot.partner, slot.place.start, slot.place.stop))


def _certain(left: list[Site], free: list[Slot], options: Mapping[int, list[Site]]) -> list[tuple[Site, Slot]]:
    """A slot that only one name fits and that name's only such slot; or, one to one, a name that fits only one slot."""
    open_names = {id(slot): [name for name in options[id(slot)] if name in left] for slot in free}
    for slot in free:
        alone = open_names[id(slot)]
        if len(alone) == 1 and sum(found == alone for found in open_names.values()) == 1:
            return [(alone[0], slot)]
    for name in left if len(left) == len(free) else ():
        fitting = [slot for slot in free if name in open_names[id(slot)]]
        if len(fitting) == 1:
            return [(name, fitting[0])]
    return []


def _in_order(
    left: list[Site], free: list[Slot], options: Mapping[int, list[Site]], settled: Settled
) -> list[tuple[Site, Slot]]:
    """Rule 5, for the names of one pattern and the slots that only they fit."""
    patterns: dict[str, list[Site]] = {}
    for name in left:
        patterns.setdefault(_NUMBER.sub("#", name.name), []).append(name)
    for names in patterns.values():
        slots = [slot for slot in free if any(name in options[id(slot)] for name in names)]
        open_to_others = any(n in left and n not in names for slot in slots for n in options[id(slot)])
        if len(slots) != len(names) or open_to_others or not _rising(settled.anchors):
            continue
        ordered = sorted(names, key=lambda name: _numbers(name.name))
        places = sorted(slots, key=lambda slot: (slot.order, slot.place.start))
        if all(name in options[id(slot)] for name, slot in zip(ordered, places, strict=True)):
            return list(zip(ordered, places, strict=True))
    return []


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(text) for text in _NUMBER.findall(name))


def _rising(anchors: Sequence[tuple[str, int]]) -> bool:
    """Whether, of the decided names of each pattern, those with higher numbers come later in the graph."""
    patterns: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for name, order in anchors:
        patterns.setdefault(_NUMBER.sub("#", name), []).append((_numbers(name), order))
    orders = ([order for _, order in sorted(found)] for found in patterns.values())
    return all(order == sorted(order) for order in orders)
