"""Adapters of experts, in the pieces that the model has them in.

transformers 5 stacks a mixture of experts on loading: ``experts.gate_up_proj`` ``[E, 2·I, H]`` is made of the
checkpoint's ``experts.<e>.gate_proj.weight`` and ``experts.<e>.up_proj.weight`` (:class:`loracc.sites.ExpertStack`). An
adapter that was trained before has a delta for each of these, one that was trained since has one for the stack, and
either can be folded into either:

* into the stack: experts and parts that have no delta get none, and B is block-diagonal over the parts, so that
  s·B·A is each part's own product: ΔW[e] = [B₁ 0; 0 B₂]·[A₁; A₂];
* into the pieces: ΔW[e][lo:hi] = s·B[e][lo:hi]·A[e].

Both are exact. Any other kind is not linear in its parts, or not a product: it stays, and is reported as unmatched.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from loracc.adapter import Adapter, Entry
from loracc.deltas import LowRank, Replacement, StackedLowRank
from loracc.dtypes import Array
from loracc.errors import BindingError
from loracc.kinds.packed_experts import PackedExperts
from loracc.passes.bind_experts import assign_experts
from loracc.passes.fit_delta import Weight
from loracc.passes.match_names import Rewriting, apply_maps, match_names
from loracc.sites import ExpertStack, Site

__all__ = ["in_the_models_pieces"]


def in_the_models_pieces(
    adapter: Adapter, stacks: Sequence[ExpertStack], sites: Collection[str], maps: Sequence[Rewriting] = ()
) -> Adapter:
    """The adapter with its deltas of experts stacked, or taken apart, where the model has only the other of the two.

    Args:
        adapter: As it was read.
        stacks: What is known of the model's experts; without any the adapter is returned as it is.
        sites: Names of the model's parameters.
        maps: The user's renamings, which names have to go through first.

    Raises:
        BindingError: Packed experts fit their stacks in several ways.
    """
    if not stacks:
        return adapter
    whole = {stack.name: stack for stack in stacks if stack.name not in sites}
    pieces = {place[0]: (stack, *place[1:]) for stack in stacks if stack.name in sites for place in stack.places()}
    found = _found(adapter, {*sites, *whole, *pieces}, maps)
    taken = _taken_apart([e for e in adapter.entries if found.get(e.name) in whole], found, whole)
    stacked = [e for e in adapter.entries if found.get(e.name) in pieces and isinstance(e.delta, LowRank)]
    made = [*taken.values(), _stacked(stacked, found, pieces)]
    gone = {id(entry) for entry in stacked} | set(taken)
    if not gone:
        return adapter
    kept = [entry for entry in adapter.entries if id(entry) not in gone]
    return replace(adapter, entries=(*kept, *(entry for entries in made for entry in entries)))


def _found(adapter: Adapter, known: Collection[str], maps: Sequence[Rewriting]) -> dict[str, str]:
    """The model's names, pieces and stacks included, of the adapter's entries and their alternatives."""
    options = [option.name for entry in adapter.entries for option in (entry, *entry.alternatives)]
    renamed = {name: apply_maps(name, maps) or name for name in options}
    try:
        matching = match_names(list(dict.fromkeys(renamed.values())), known)
    except BindingError:
        return {}  # binding itself says it
    return {name: matching.found[new] for name, new in renamed.items() if new in matching.found}


def _taken_apart(
    entries: Sequence[Entry], found: dict[str, str], stacks: dict[str, ExpertStack]
) -> dict[int, list[Entry]]:
    """The pieces' entries of each entry, by its id, for those that can be taken apart."""
    options = [option for entry in entries for option in (entry, *entry.alternatives)]
    weights = {
        option.name: _weight(stacks[found[option.name]]) for option in options if found.get(option.name) in stacks
    }
    packed = [entry for entry in entries if isinstance(entry.delta, PackedExperts)]
    decided = dict(zip(map(id, packed), assign_experts(packed, weights), strict=True))
    result = {}
    for entry in entries:
        one = decided.get(id(entry), entry)
        stack = stacks[found[one.name]]
        parts = _parts(one, stack)
        if parts:
            result[id(entry)] = parts
    return result


def _weight(stack: ExpertStack) -> Weight:
    module, _, parameter = stack.name.rpartition(".")
    return Weight(Site(module, parameter, "experts", stack.name), stack.shape, settled=True)


def _parts(entry: Entry, stack: ExpertStack) -> list[Entry]:
    delta = entry.delta.resolve(stack.shape) if isinstance(entry.delta, PackedExperts) else entry.delta
    if delta.shape != stack.shape or not isinstance(delta, StackedLowRank | Replacement):
        return []
    made = []
    for tensor, expert, lo, hi in stack.places():
        module, _, parameter = tensor.rpartition(".")
        part = (
            LowRank(delta.a[expert], delta.b[expert, lo:hi], delta.s)
            if isinstance(delta, StackedLowRank)
            else replace(delta, new=delta.new[expert, lo:hi])
        )
        made.append(Entry(module, parameter, part, entry.keys, fan_in_fan_out=False, covers=(entry.name,)))
    return made


def _stacked(
    entries: Sequence[Entry], found: dict[str, str], pieces: dict[str, tuple[ExpertStack, int, int, int]]
) -> list[Entry]:
    groups: dict[str, dict[tuple[int, int], Entry]] = {}
    stacks = {}
    for entry in entries:
        stack, expert, lo, hi = pieces[found[entry.name]]
        if entry.delta.shape != (hi - lo, stack.columns):
            raise BindingError(
                f"{entry.name}: the adapter's tensors ({', '.join(entry.keys)}) fit a weight of shape "
                f"{list(entry.delta.shape)}, and it has [{hi - lo}, {stack.columns}].",
                hint="Is it the adapter of another model, or of another size of this one?",
            )
        stacks[stack.name] = stack
        other = groups.setdefault(stack.name, {}).setdefault((expert, lo), entry)
        if other is not entry:
            raise BindingError(
                f"{other.name} and {entry.name} both change {found[entry.name]}.", hint="Give one of them."
            )
    return [_stack(stacks[name], parts) for name, parts in groups.items()]


def _stack(stack: ExpertStack, parts: dict[tuple[int, int], Entry]) -> Entry:
    """One delta of all parts: a part's rank is the largest of any expert's, and its A stands below those before it.

    Scales that differ are multiplied into B, in float64.
    """
    experts, rows, columns = stack.shape
    deltas = {place: entry.delta for place, entry in parts.items() if isinstance(entry.delta, LowRank)}
    shared = next(iter(deltas.values())).s if len({delta.s for delta in deltas.values()}) == 1 else None
    ranks = {
        lo: max(d.rank for (_, start), d in deltas.items() if start == lo) for lo in sorted({lo for _, lo in deltas})
    }
    first = dict(zip(ranks, itertools.accumulate(ranks.values(), initial=0), strict=False))
    stored = np.result_type(*(array.dtype for delta in deltas.values() for array in (delta.a, delta.b)))
    dtype = np.dtype(np.float64) if shared is None else stored
    a: Array = np.zeros((experts, sum(ranks.values()), columns), dtype)
    b: Array = np.zeros((experts, rows, a.shape[1]), dtype)
    for (expert, lo), delta in deltas.items():
        at = slice(first[lo], first[lo] + delta.rank)
        a[expert, at] = delta.a
        b[expert, lo : lo + delta.b.shape[0], at] = delta.b
        if shared is None:
            b[expert, lo : lo + delta.b.shape[0], at] *= delta.s
    module, _, parameter = stack.name.rpartition(".")
    keys = tuple(key for entry in parts.values() for key in entry.keys)
    covers = tuple(entry.name for entry in parts.values())
    made = StackedLowRank(a, b, 1.0 if shared is None else shared)
    return Entry(module, parameter, made, keys, fan_in_fan_out=False, covers=covers)
