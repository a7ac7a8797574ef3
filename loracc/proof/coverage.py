"""Is every tensor of the adapters used, and used once? A fold that leaves some out still looks like a fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracc.adapter import Adapter, Entry
from loracc.folded import Binding
from loracc.proof.verdict import Verdict

__all__ = ["Coverage", "coverage_of"]


@dataclass(frozen=True)
class Coverage:
    """The adapters' tensors and what became of them.

    Attributes:
        verdict: pass when each is consumed exactly once, or left out because the user allowed it.
        reason: What is not.
        tensors: Keys of the adapters' files that make up deltas.
        consumed: How many of them are in a delta that is bound.
        unmatched: Names that fit nowhere; only with ``--allow-unmatched``.
    """

    verdict: Verdict
    reason: str = ""
    tensors: int = 0
    consumed: int = 0
    unmatched: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "unmatched": list(self.unmatched)}


def coverage_of(
    adapters: Sequence[Adapter], bindings: Sequence[Binding], unmatched: Sequence[str], elsewhere: Sequence[str] = ()
) -> Coverage:
    """What binding made of the adapters' entries.

    Args:
        adapters: As they were read.
        bindings: As they were bound; a delta for a tied weight may be bound at several sites.
        unmatched: What the user allowed to fit nowhere.
        elsewhere: Names of deltas for another part of the model, which are not this graph's.
    """
    if not adapters:
        return Coverage("skipped", "the deltas were found in the graph")
    bound = {(binding.adapter, name) for binding in bindings for name in (binding.key, *binding.covers)}
    lost: list[str] = []
    tensors: set[tuple[str, str]] = set()
    consumed: set[tuple[str, str]] = set()
    for adapter in adapters:
        for entry in adapter.entries:
            if entry.name in elsewhere:
                continue
            keys = {(adapter.name, key) for key in entry.keys}
            tensors |= keys
            names = {(adapter.name, name) for name in _names(entry)}
            if names & bound or any(_is(binding, adapter, entry.delta) for binding in bindings):
                consumed |= keys
            elif not entry.optional and not set(entry.keys) & set(unmatched):
                lost.append(entry.name)
    # One weight may have several entries: a LoRA and the base's own copy that PEFT saves beside an embedding's.
    named = Counter((adapter.name, name) for adapter in adapters for entry in adapter.entries for name in _names(entry))
    places = Counter((binding.adapter, binding.key, binding.site) for binding in bindings)
    twice = [key for (adapter_name, key, _), count in places.items() if count > max(named[adapter_name, key], 1)]
    problems = [f"{lost[0]} is bound to no weight"] if lost else []
    problems += [f"{twice[0]} is bound twice to one weight"] if twice else []
    verdict: Verdict = "fail" if problems else "pass"
    return Coverage(verdict, "; ".join(problems), len(tensors), len(consumed), tuple(unmatched))


def _names(entry: Entry) -> set[str]:
    return {one.name for one in (entry, *entry.alternatives)}


def _is(binding: Binding, adapter: Adapter, delta: object) -> bool:
    """A module that was found under another name (a map, a spelling of the format) is told by its delta."""
    return binding.adapter == adapter.name and binding.delta is delta
