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
from collections.abc import Mapping, Sequence
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
    puzzle = _Puzzle(names, slots, settled)
    while puzzle.take_certain() or puzzle.take_in_order():
        pass
    pairs = [(names[name], slots[slot]) for slot, name in sorted(puzzle.pairs.items())]
    return pairs, [names[name] for name in sorted(puzzle.left)]


class _Puzzle:
    """Names and slots by number; ``options`` holds the names that each free slot may be."""

    def __init__(self, names: Sequence[Site], slots: Sequence[Slot], settled: Settled) -> None:
        self.names, self.slots, self.settled = names, slots, settled
        self.left = set(range(len(names)))
        self.pairs: dict[int, int] = {}
        allowed = _Allowed(names, slots, settled)
        self.options = {index: allowed.of(slot) for index, slot in enumerate(slots)}

    def take_certain(self) -> bool:
        """A slot that only one name fits and that name's only such slot; or, one to one, a name that fits one slot."""
        alone: dict[int, list[int]] = {}
        for slot, options in self.options.items():
            if len(options) == 1:
                alone.setdefault(next(iter(options)), []).append(slot)
        found = {slots[0]: name for name, slots in alone.items() if len(slots) == 1}
        if not found and len(self.left) == len(self.options):
            fitting: dict[int, list[int]] = {}
            for slot, options in self.options.items():
                for name in options:
                    fitting.setdefault(name, []).append(slot)
            for name, slots in sorted(fitting.items()):
                if len(slots) == 1:
                    found.setdefault(slots[0], name)
        return self._take(found)

    def take_in_order(self) -> bool:
        """Rule 5, for the names of one pattern and the slots that only they fit."""
        patterns: dict[str, set[int]] = {}
        for name in sorted(self.left):
            patterns.setdefault(_NUMBER.sub("#", self.names[name].name), set()).add(name)
        for mine in patterns.values():
            slots = [slot for slot, options in self.options.items() if options & mine]
            if len(slots) != len(mine) or any(self.options[slot] - mine for slot in slots):
                continue
            if not _rising(self.settled.anchors):
                return False
            ordered = sorted(mine, key=lambda name: _numbers(self.names[name].name))
            places = sorted(slots, key=lambda slot: (self.slots[slot].order, self.slots[slot].place.start))
            if all(name in self.options[slot] for name, slot in zip(ordered, places, strict=True)):
                return self._take(dict(zip(places, ordered, strict=True)))
        return False

    def _take(self, found: Mapping[int, int]) -> bool:
        self.pairs.update(found)
        taken = set(found.values())
        self.left -= taken
        self.options = {slot: options - taken for slot, options in self.options.items() if slot not in found}
        return bool(found)


class _Allowed:
    """Rules 2 to 4: which names a slot may be."""

    def __init__(self, names: Sequence[Site], slots: Sequence[Slot], settled: Settled) -> None:
        self.names, self.settled = names, settled
        self.every = set(range(len(names)))
        self.of_module: dict[str, set[int]] = {}
        for index, name in enumerate(names):
            self.of_module.setdefault(name.module, set()).add(index)
        self.scopes: dict[str, set[int]] = {}
        self.tied = {"embedding", "linear"} <= {slot.kind for slot in slots}

    def of(self, slot: Slot) -> set[int]:
        left = self.every
        for scope in slot.scopes:
            left = left & self._traced_in(scope) or left
        left = left & self.of_module.get(self._partner_module(slot), set()) or left
        if self.tied and slot.kind in ("embedding", "linear"):
            return left & self._tied_as(slot.kind)
        return left

    def _traced_in(self, scope: str) -> set[int]:
        if scope not in self.scopes:
            known = (indices for module, indices in self.of_module.items() if related(module, scope))
            self.scopes[scope] = set().union(*known)
        return self.scopes[scope]

    def _partner_module(self, slot: Slot) -> str:
        if slot.partner is None or slot.kind != "bias":
            return ""
        return self.settled.modules.get((slot.partner, slot.place.start, slot.place.stop), "")

    def _tied_as(self, kind: str) -> set[int]:
        """Names that may be this reader of a tied weight: a lone one is the look-up's, and a head is told of as linear.

        All, where the checkpoint does not say.
        """
        if len(self.names) == 1:
            return self.every if kind == "embedding" else set()
        heads = {index for index in self.every if self.names[index].kind == "linear"}
        if not heads:
            return self.every
        return heads if kind == "linear" else self.every - heads


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(text) for text in _NUMBER.findall(name))


def _rising(anchors: Sequence[tuple[str, int]]) -> bool:
    """Whether, of the decided names of each pattern, those with higher numbers come later in the graph."""
    patterns: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for name, order in anchors:
        patterns.setdefault(_NUMBER.sub("#", name), []).append((_numbers(name), order))
    orders = ([order for _, order in sorted(found)] for found in patterns.values())
    return all(order == sorted(order) for order in orders)
