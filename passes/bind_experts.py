"""Adapters of raw expert parameters: the shapes of a module's parameters decide what the file leaves open.

PEFT's file does not say which of a module's parameters a pair of factors belongs to, nor which axis of a stack is the
input. Of all ways to give each pair another parameter, the one whose shapes fit is taken. Square stacks follow the
oblong ones of the same module: ``is_transposed`` is the module's property.

Experts without a gate have parameters that are each other's transposes, and shapes cannot tell them apart. PEFT wraps
them in the order in which the model registers them, the innermost first, and all of transformers 5.23 registers them in
the order of ``ORDER``; other names are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loracc.adapter import Entry
from loracc.errors import BindingError
from loracc.kinds.packed_experts import PackedExperts
from loracc.passes.fit_delta import Weight

__all__ = ["ORDER", "assign_experts"]

#: Names of expert parameters in the order in which every model of transformers registers them.
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def assign_experts(entries: Sequence[Entry], weights: Mapping[str, Weight]) -> list[Entry]:
    """The entries of packed experts, each with its parameter and orientation decided, in their order.

    Args:
        entries: Entries whose delta is :class:`PackedExperts`.
        weights: The weight of every parameter that an entry or one of its alternatives names, where the model has it.

    Raises:
        BindingError: Several assignments fit.
    """
    modules: dict[str, list[Entry]] = {}
    for entry in entries:
        modules.setdefault(entry.module, []).append(entry)
    decided = {}
    for group in modules.values():
        for entry, chosen in zip(group, _oriented(_assigned(group, weights), weights), strict=True):
            decided[id(entry)] = chosen
    return [decided[id(entry)] for entry in entries]


def _assigned(group: Sequence[Entry], weights: Mapping[str, Weight]) -> list[Entry]:
    options = [[option for option in (entry, *entry.alternatives) if _fits(option, weights)] for entry in group]
    ways = [way for way in itertools.product(*options) if len({entry.name for entry in way}) == len(way)]
    if len(ways) > 1:
        # The reader gives a module's entries from the innermost wrapper out.
        ways = [way for way in ways if _registered_so([entry.parameter for entry in way])] or ways
    if len(ways) > 1:
        shown = "; ".join(", ".join(f"{e.keys[0]} is {e.parameter}" for e in way) for way in ways[:4])
        raise BindingError(
            f"{group[0].module}: the adapter's factors fit its parameters in {len(ways)} ways, and the file does not "
            f"say which is meant: {shown}.",
            hint="Train with one target parameter per module, or convert the adapter to one.",
        )
    # Where nothing fits, the usual order stays, and the shapes are reported against it.
    return list(ways[0]) if ways else list(group)


def _registered_so(parameters: Sequence[str]) -> bool:
    places = [ORDER.index(name) if name in ORDER else -1 for name in parameters]
    return -1 not in places and places == sorted(places)


def _fits(entry: Entry, weights: Mapping[str, Weight]) -> bool:
    weight = weights.get(entry.name)
    return (
        weight is not None and isinstance(entry.delta, PackedExperts) and bool(entry.delta.orientations(weight.shape))
    )


def _oriented(entries: Sequence[Entry], weights: Mapping[str, Weight]) -> list[Entry]:
    known = set()
    for entry in entries:
        weight = weights.get(entry.name)
        if weight is not None and isinstance(entry.delta, PackedExperts) and len(weight.shape) == 3:
            found = entry.delta.orientations(weight.shape)
            known |= set(found) if len(found) == 1 else set()
    if len(known) != 1:
        return list(entries)
    (first,) = known
    return [_with_orientation(entry, weights, first) for entry in entries]


def _with_orientation(entry: Entry, weights: Mapping[str, Weight], input_first: bool) -> Entry:
    weight, delta = weights.get(entry.name), entry.delta
    if weight is None or not isinstance(delta, PackedExperts) or len(delta.orientations(weight.shape)) < 2:
        return entry
    return replace(entry, delta=replace(delta, input_first=input_first))
