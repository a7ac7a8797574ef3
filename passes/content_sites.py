"""Sites by content (DESIGN.md 3, way 4): a checkpoint's tensors looked for among a graph's initializers.

1. Sampled elements tell which stretches of which initializers a tensor may be (:mod:`loracc.passes.content_places`).
2. Where several tensors of the checkpoint may be one stretch, all of them are compared in full.
3. Equal ones are told apart by what else is known (:mod:`loracc.passes.content_names`), those that are alone first.
4. A parameter that the graph knows already under its name, and that holds what the checkpoint says, stays as it is.

What an adapter then binds to is compared in full (:meth:`ContentMatch.differing`). A graph's own name for a weight that
the checkpoint knows otherwise stays beside the checkpoint's; one that the checkpoint contradicts does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from loracc.model import BaseModel
from loracc.passes.content_equal import digest, first_difference
from loracc.passes.content_index import Candidate, ContentIndex
from loracc.passes.content_names import Settled, assign
from loracc.passes.content_places import Place, find_places
from loracc.passes.content_slots import Slot, node_positions, slots_of
from loracc.sites import Site, SiteTable

__all__ = ["ContentMatch", "Found", "match_content"]


@dataclass(frozen=True)
class Found:
    """A checkpoint's tensor in the graph: where, and whether transposed as stored."""

    tensor: str
    place: Place
    turned: bool


@dataclass(frozen=True)
class ContentMatch:
    """What was found.

    Attributes:
        sites: The graph's sites, those found by content among them.
        found: By site found by content: the tensor it was found by.
        ambiguous: By name of a parameter that may be several weights: these.
        cut: By name of a parameter that lies in the graph along an axis that no site has: its initializer.
        names: The checkpoint's tensor of every parameter that it knows.
        tensors: The checkpoint's tensors.
        places: Every place that holds some tensor of the checkpoint, whatever it is called.
        notes: What the user should know.
    """

    sites: SiteTable
    found: Mapping[Site, Found]
    ambiguous: Mapping[str, tuple[str, ...]]
    cut: Mapping[str, str]
    names: Mapping[str, str]
    tensors: Mapping[str, ir.TensorProtocol]
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()

    def differing(self, model: ir.Model, site: Site) -> tuple[Found, tuple[int, ...]] | None:
        """What a site was found by and the index of the first element that differs; None where all are equal."""
        found = self.found.get(site)
        if found is None:
            return None
        tensor = model.graph.initializers[site.initializer].const_value
        assert tensor is not None, f"a place without a value: {site.initializer}"
        at = first_difference(tensor, found.place, self.tensors[found.tensor], turned=found.turned)
        return None if at is None else (found, at)


def match_content(model: BaseModel, base: BaseModel) -> ContentMatch:
    """Look for the tensors of ``base`` in the graph of ``model``.

    Args:
        model: A traced model; its graph is not changed.
        base: The checkpoint: a model whose sites have the names that are wanted.
    """
    values = base.ir.graph.initializers.items()
    index = ContentIndex({name: value.const_value for name, value in values if value.const_value is not None})
    places = _told_apart(model.ir, find_places(model.ir, index), index)
    return _Matcher(model, base, index, places).run()


def _told_apart(model: ir.Model, places: Sequence[Place], index: ContentIndex) -> list[Place]:
    """Rule 2."""
    digests: dict[str, str] = {}
    exact = []
    for place in places:
        classes: dict[tuple[str, bool], list[Candidate]] = {}
        if len(place.candidates) > 1:
            for candidate in place.candidates:
                if candidate.name not in digests:
                    digests[candidate.name] = digest(index.tensors[candidate.name])
                classes.setdefault((digests[candidate.name], candidate.turned), []).append(candidate)
        if len(classes) < 2:
            exact.append(place)
            continue
        stored = model.graph.initializers[place.initializer].const_value
        assert stored is not None
        equal = [
            group
            for (_, turned), group in classes.items()
            if first_difference(stored, place, index.tensors[group[0].name], turned=turned) is None
        ]
        if equal:
            exact.append(replace(place, candidates=tuple(c for group in equal for c in group)))
    return exact


class _Matcher:
    """Rules 3 and 4."""

    def __init__(self, model: BaseModel, base: BaseModel, index: ContentIndex, places: list[Place]) -> None:
        self.model, self.index, self.places = model, index, places
        self.positions = node_positions(model.ir)
        self.known = model.sites.by_name()
        self.names: dict[str, list[Site]] = {}
        for site in base.sites:
            if site.layout.whole and (site.module or site.name == site.initializer):
                self.names.setdefault(site.initializer, []).append(site)
        self.pairs: list[tuple[Site, Slot]] = []
        self.modules: dict[tuple[ir.Node, int, int | None], str] = {}
        self.ambiguous: dict[str, tuple[str, ...]] = {}
        self.cut: dict[str, str] = {}

    def run(self) -> ContentMatch:
        groups = [(self._names_of(group), self._slots_of(group)) for group in _components(self.places)]
        # What is alone first, and weights before biases: what is decided decides more.
        for names, slots in sorted(groups, key=lambda item: (len(item[0]) > 1, item[1][0].kind == "bias")):
            self._assign(names, slots)
        sites, found, notes = self._table()
        parameters = {site.name: tensor for tensor, named in self.names.items() for site in named}
        return ContentMatch(
            sites,
            found,
            self.ambiguous,
            self.cut,
            parameters,
            self.index.tensors,
            tuple(self.places),
            tuple(notes),
        )

    def _names_of(self, places: Sequence[Place]) -> list[Site]:
        tensors = dict.fromkeys(candidate.name for place in places for candidate in place.candidates)
        return [site for tensor in tensors for site in self.names.get(tensor, [])]

    def _slots_of(self, places: Sequence[Place]) -> list[Slot]:
        count = len(self._names_of(places)) - len(places) + 1
        return [slot for place in places for slot in slots_of(self.model.ir, place, count, self.positions)]

    def _assign(self, names: list[Site], slots: list[Slot]) -> None:
        for name in list(names):
            if slot := self._settled(name, slots):
                self._take(name, slot)
                names.remove(name)
                slots.remove(slot)
        anchors = [(site.name, slot.order) for site, slot in self.pairs]
        pairs, left = assign(names, slots, Settled(self.modules, anchors))
        for name, slot in pairs:
            self._take(name, slot)
        taken = {id(slot) for _, slot in pairs}
        free = tuple(dict.fromkeys(slot.place.initializer for slot in slots if id(slot) not in taken))
        self.ambiguous.update((name.name, free) for name in left if free)

    def _settled(self, name: Site, slots: list[Slot]) -> Slot | None:
        """Rule 4: the slot that the graph itself gives this name."""
        for site in self.known.get(name.name, []):
            for slot in slots:
                here = slot.place.initializer == site.initializer and site.layout == slot.layout
                if here and (not site.consumer or not slot.consumer or site.consumer == slot.consumer):
                    return slot
        return None

    def _take(self, name: Site, slot: Slot) -> None:
        self.pairs.append((name, slot))
        if slot.kind in ("linear", "conv") and slot.partner is not None:
            self.modules[slot.partner, slot.place.start, slot.place.stop] = name.module

    def _table(self) -> tuple[SiteTable, dict[Site, Found], list[str]]:
        content: dict[Site, Found] = {}
        refuted: set[Site] = set()
        notes = []
        for name, slot in self.pairs:
            if slot.layout is None:
                self.cut[name.name] = slot.place.initializer
                continue
            rivals = self.known.get(name.name, [])
            if any(site.initializer == slot.place.initializer for site in rivals):
                continue
            refuted.update(rivals)
            notes += [
                f"{name.name}: {site.initializer!r} goes by that name and holds other values than the base; they are "
                f"in {slot.place.initializer!r}."
                for site in rivals
            ]
            kind = name.kind if slot.kind == "other" else slot.kind
            site = Site(
                name.module, name.parameter, kind, slot.place.initializer, slot.layout, slot.consumer, "content"
            )
            turned = next(c.turned for c in slot.place.candidates if c.name == name.initializer)
            content[site] = Found(name.initializer, slot.place, turned)
        placed = {site.initializer for site in content}
        kept = [s for s in self.model.sites if s not in refuted and not (s.initializer in placed and _guess(s))]
        return SiteTable([*kept, *content]), content, notes


def _guess(site: Site) -> bool:
    """No name at all, or a scope's for one of several readers; the checkpoint knows which parameters there are."""
    return not site.module or (site.source == "scope" and bool(site.consumer))


def _components(places: Sequence[Place]) -> list[list[Place]]:
    """Places that have candidates in common, and so on."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for place in places:
        for candidate in place.candidates:
            leader[find(candidate.name)] = find(place.candidates[0].name)
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(find(place.candidates[0].name), []).append(place)
    return list(groups.values())
