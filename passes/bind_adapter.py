"""Adapters to sites: every delta finds the weight it is for, or the call fails and says what did not.

Per adapter:

1. names: by ``--map``, exactly, or behind one prefix (:mod:`loracc.passes.match_names`); a format's own spelling of
   module paths is looked up first (:mod:`loracc.passes.base_names`), and deltas of experts are stacked or taken apart
   as the model keeps them (:mod:`loracc.passes.expert_stacks`);
2. of several sites with one name the better known wins: recorded, by name, by scope;
3. raw expert parameters are told apart by their shapes (:mod:`loracc.passes.bind_experts`);
4. shapes and orientation (:mod:`loracc.passes.fit_delta`);
5. nothing lands where something of its kind already is.

All problems are collected and raised together. What binds is annotated on the initializers (``folded.annotate``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from loracc.adapter import Adapter, Entry
from loracc.deltas import RowReplacement
from loracc.errors import BindingError, LoraccError, UnsupportedError, combined
from loracc.folded import Binding, annotate, clear_bindings
from loracc.kinds.packed_experts import PackedExperts
from loracc.model import BaseModel
from loracc.passes.base_names import with_base_names
from loracc.passes.bind_experts import assign_experts
from loracc.passes.decode_weights import undecoded
from loracc.passes.expert_stacks import in_the_models_pieces
from loracc.passes.fit_delta import Weight, check_weight, fit, is_transposed
from loracc.passes.match_names import Matching, Rewriting, apply_maps, match_names, nearest, parse_maps
from loracc.passes.tied_sites import tied_sites
from loracc.sites import ExpertStack, Site, SiteTable

__all__ = ["BindAdapterPass", "BindOptions", "BindResult", "bind", "maps_of", "refuse_unused_maps"]

#: How a site's name is known, best first.
_SOURCES = ("recorded", "name", "scope", "content", "map")


@dataclass(frozen=True)
class BindOptions:
    """How an adapter's names are matched.

    Attributes:
        maps: ``OLD=NEW`` renamings.
        allow_unmatched: Report what fits nowhere instead of refusing.
        traced: The graph has the computation; False for a bare checkpoint.
        explain: What else is known of a name that no site has; "" for nothing.
        elsewhere: Names of parameters that the model has and this graph, one part of it, has not.
        stacks: Parameters that the model has as one and its checkpoint in pieces, or the other way round.
    """

    maps: tuple[str, ...] = ()
    allow_unmatched: bool = False
    traced: bool = True
    explain: Callable[[str], str] | None = None
    elsewhere: frozenset[str] = frozenset()
    stacks: tuple[ExpertStack, ...] = ()


@dataclass
class BindResult:
    """What bound.

    Attributes:
        bindings: In the adapters' order.
        unmatched: Keys of the files that fit nowhere (only with ``allow_unmatched``).
        elsewhere: Names of the adapters' deltas that are for the model's other part, and not for this graph.
        notes: What the user should know.
    """

    bindings: list[Binding] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def bind(
    model: BaseModel,
    adapters: Sequence[Adapter],
    *,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    explain: Callable[[str], str] | None = None,
) -> BindResult:
    """Bind adapters to a loaded model and annotate its initializers with what bound.

    Raises:
        BindingError: Unmatched names, shapes that disagree, ambiguity, conflicts; all of them at once.
        UnsupportedError: A weight cannot take a delta.
    """
    options = BindOptions(tuple(maps), allow_unmatched, model.traced, explain, model.elsewhere, model.stacks)
    total = BindResult()
    for value in model.ir.graph.initializers.values():
        clear_bindings(value)  # of a call that failed halfway
    errors: list[LoraccError] = []
    refuse_unused_maps(adapters, options.maps)
    for adapter in adapters:
        binder = BindAdapterPass(adapter, model.sites, options, total.bindings)
        try:
            binder(model.ir)
        except LoraccError as error:
            errors.append(error)
            continue
        total.bindings += binder.result.bindings
        total.unmatched += binder.result.unmatched
        total.elsewhere += binder.result.elsewhere
        total.notes += [*adapter.notes, *binder.result.notes]
    if errors:
        raise combined(errors)
    return total


def refuse_unused_maps(adapters: Sequence[Adapter], maps: Sequence[str]) -> None:
    """A map that renames nothing is a slip of the pen. What kohya's names stand for is not known yet."""
    if any(adapter.naming is not None for adapter in adapters):
        return
    names = [name for adapter in adapters for name in _entry_names(adapter)]
    for text, rewriting in zip(maps, parse_maps(maps), strict=True):
        if all(apply_maps(name, [rewriting]) is None for name in names):
            raise BindingError(
                f"--map {text}: no module of the adapters is named {rewriting.old!r} or lies in it.",
                hint=f"The first of their names: {', '.join(names[:3])}",
            )


def maps_of(adapter: Adapter, maps: Sequence[str]) -> list[str]:
    """Those maps that rename something of the adapter; all of them where its names are not known yet."""
    if adapter.naming is not None:
        return list(maps)
    names = _entry_names(adapter)
    pairs = zip(maps, parse_maps(maps), strict=True)
    return [text for text, one in pairs if any(apply_maps(name, [one]) is not None for name in names)]


def _entry_names(adapter: Adapter) -> list[str]:
    return [option.name for entry in adapter.entries for option in (entry, *entry.alternatives)]


class BindAdapterPass(ir.passes.InPlacePass):
    """See the module's docstring; ``result`` holds what bound.

    Args:
        adapter: What to bind.
        sites: Where a delta can act.
        options: How names are matched.
        before: What other adapters have bound already.
    """

    def __init__(
        self,
        adapter: Adapter,
        sites: SiteTable,
        options: BindOptions | None = None,
        before: Sequence[Binding] = (),
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.sites = sites
        self.options = options or BindOptions()
        self.before = tuple(before)
        self.result = BindResult()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        binder = _Binder(self.adapter, self.sites, self.options, model)
        self.result = binder.run(self.before)
        annotate(model, self.result.bindings)
        return ir.passes.PassResult(model, modified=bool(self.result.bindings))


class _Binder:
    """One adapter's binding to one model."""

    def __init__(self, adapter: Adapter, sites: SiteTable, options: BindOptions, model: ir.Model) -> None:
        self.options, self.model, self.maps = options, model, parse_maps(options.maps)
        self.adapter = with_base_names(
            adapter, (site.module for site in sites), keep=lambda name: apply_maps(name, self.maps) is not None
        )
        self.table = {
            name: found for name, found in sites.by_name().items() if found[0].module or found[0].initializer == name
        }
        self.sites = tuple(sites)
        self.adapter = in_the_models_pieces(self.adapter, options.stacks, self.table, self.maps)
        self.errors: list[LoraccError] = []
        self.result = BindResult()
        self.ways: dict[str, str] = {}

    def run(self, before: Sequence[Binding]) -> BindResult:
        """Rules 1 to 5."""
        matching = self._match()
        weights = self._weights(matching)
        entries = self._decide_experts([e for e in self.adapter.entries if e.name in matching.found], weights)
        straight = [
            turned for e in entries if e.name in weights and (turned := is_transposed(e, weights[e.name])) is not None
        ]
        for entry in entries:
            if entry.name in weights:
                self._bind_one(entry, weights[entry.name], frozenset(straight))
        self._follow_ties()
        self._refuse_unmatched(matching)
        self._refuse_conflicts(before)
        if not self.errors and not self.result.bindings:
            other = " All of it is for the model's other part." if self.result.elsewhere else ""
            self.errors.append(BindingError(f"adapter {self.adapter.name!r}: nothing of it fits the model.{other}"))
        if self.errors:
            raise combined(self.errors)
        return self.result

    def _match(self) -> Matching:
        """Site names of all entries and their alternatives, by the adapter's names."""
        renamed: dict[str, str] = {}
        for entry in self.adapter.entries:
            for option in (entry, *entry.alternatives):
                mapped = apply_maps(option.name, self.maps)
                if mapped is not None:
                    self.ways[option.name] = "map"
                renamed[option.name] = self._parameter(mapped if mapped is not None else option.name)
        primary = [renamed[entry.name] for entry in self.adapter.entries]
        try:
            matching = match_names(list(dict.fromkeys(primary)), self.table.keys() | self.options.elsewhere)
        except BindingError as error:
            raise BindingError(f"adapter {self.adapter.name!r}: {error.message}", hint=error.hint) from error
        found = {}
        for name, new in renamed.items():
            target = matching.found.get(new) or self._rewritten(new, matching.rewriting)
            if target is not None:
                found[name] = target
        if matching.rewriting is not None:
            self.result.notes.append(f"adapter {self.adapter.name!r}: names were matched as {matching.rewriting}.")
        unmatched = tuple(entry.name for entry in self.adapter.entries if entry.name not in found)
        here = {name: target for name, target in found.items() if target in self.table}
        other = found.keys() - here.keys()
        self._tell_of_elsewhere([entry.name for entry in self.adapter.entries if entry.name in other])
        return replace(matching, found=here, unmatched=unmatched)

    def _tell_of_elsewhere(self, names: list[str]) -> None:
        self.result.elsewhere += names
        if names:
            self.result.notes.append(
                f"adapter {self.adapter.name!r}: {len(names)} deltas are for the model's other part, and stay for it."
            )

    def _parameter(self, name: str) -> str:
        """An attention's fused projection is its "weight" to some trainers."""
        module, _, parameter = name.rpartition(".")
        fused = f"{module}.in_proj_weight"
        return fused if parameter == "weight" and name not in self.table and fused in self.table else name

    def _rewritten(self, name: str, rewriting: Rewriting | None) -> str | None:
        known = self.table.keys() | self.options.elsewhere
        if name in known:
            return name
        new = rewriting.apply(name) if rewriting is not None else None
        return new if new in known else None

    def _weights(self, matching: Matching) -> dict[str, Weight]:
        """The weight of every matched name; those that cannot take a delta are errors."""
        weights = {}
        for name, target in matching.found.items():
            try:
                site = self._site(name, self.table[target])
                value = self.model.graph.initializers[site.initializer]
                weights[name] = check_weight(site, value, traced=self.options.traced)
            except LoraccError as error:
                self.errors.append(error)
        return weights

    def _site(self, name: str, sites: Sequence[Site]) -> Site:
        """Rule 2."""
        best = min(_rank(site) for site in sites)
        chosen = [site for site in sites if _rank(site) == best]
        if len(chosen) > 1 and len({site.initializer for site in chosen}) == 1:
            # One tensor, read in several ways under its one name: a tied embedding whose other module is not known.
            chosen = list(dict.fromkeys(chosen))
            chosen = [site for site in chosen if site.kind == "embedding"] or chosen
        if len(chosen) > 1:
            where = ", ".join(f"{site.initializer!r} ({site.kind})" for site in chosen)
            raise BindingError(
                f"{name}: {len(chosen)} weights of the model go by this name: {where}.",
                hint="Export the model again with loracc, which records what each weight is.",
            )
        return chosen[0]

    def _decide_experts(self, entries: Sequence[Entry], weights: Mapping[str, Weight]) -> list[Entry]:
        """Rule 3; the entries in their order."""
        packed = [entry for entry in entries if isinstance(entry.delta, PackedExperts)]
        try:
            decided = dict(zip(map(id, packed), assign_experts(packed, weights), strict=True))
        except BindingError as error:
            self.errors.append(error)
            return [entry for entry in entries if not isinstance(entry.delta, PackedExperts)]
        return [decided.get(id(entry), entry) for entry in entries]

    def _bind_one(self, entry: Entry, weight: Weight, evidence: frozenset[bool]) -> None:
        """Rule 4."""
        try:
            site, delta = fit(entry, weight, evidence)
        except LoraccError as error:
            # A delta knows its shapes and not its name.
            named = entry.module in error.message
            self.errors.append(error if named else type(error)(f"{entry.name}: {error.message}", hint=error.hint))
            return
        way = self.ways.get(entry.name, site.source)
        self.result.bindings.append(Binding(site, delta, self.adapter.name, entry.name, way, entry.covers))

    def _follow_ties(self) -> None:
        """What is meant for every module of a tied weight goes to the copies that an export made of it."""
        for binding in [b for b in self.result.bindings if b.delta.follows_tying and b.site.kind == "embedding"]:
            bound = {other.site.name for other in self.result.bindings if other.delta.kind == binding.delta.kind}
            candidates = [
                site for site in self.sites if site.kind in ("linear", "embedding") and site.name not in bound
            ]
            for site in tied_sites(self.model, binding.site, candidates):
                self.result.bindings.append(replace(binding, site=site))
                self.result.notes.append(f"{binding.site.name} is tied to {site.name}: both are changed.")

    def _refuse_unmatched(self, matching: Matching) -> None:
        entries = {entry.name: entry for entry in self.adapter.entries}
        missing = [entries[name] for name in dict.fromkeys(matching.unmatched) if not entries[name].optional]
        if not missing:
            return
        if self.options.allow_unmatched:
            self.result.unmatched += [key for entry in missing for key in entry.keys]
            names = ", ".join(entry.name for entry in missing)
            self.result.notes.append(
                f"adapter {self.adapter.name!r}: {len(missing)} deltas fit nowhere and were left out: {names}."
            )
            return
        known = list(self.table)
        explain = self.options.explain or (lambda _name: "")
        lines = [_unmatched_line(entry, nearest(entry.name, known), explain(entry.name)) for entry in missing]
        hint = "Rename with --map OLD=NEW, or leave these out with --allow-unmatched."
        if matching.suggestion is not None:
            hint = (
                f"If {matching.suggestion} is what is meant: --map {matching.suggestion.old}={matching.suggestion.new}"
            )
        elif any(entry.parameter == "bias" for entry in missing):
            hint += " A bias that the base layer does not have cannot be folded: it would need another node."
        total = len(self.adapter.entries)
        message = f"adapter {self.adapter.name!r}: {len(missing)} of {total} deltas fit no weight of the model:"
        reasons = {entry.name: reason for entry in missing if (reason := self._is_quantised(entry))}
        if reasons:
            why = "\n".join(f"  {name} is quantised here: {reason}" for name, reason in reasons.items())
            self.errors.append(
                UnsupportedError(
                    f"{message}\n" + "\n".join(lines) + f"\n{why}",
                    hint="Quantise as QDQ (DequantizeLinear) or MatMulNBits, which deltas can be folded into, or fold "
                    "into the float model and quantise the result.",
                )
            )
        else:
            self.errors.append(BindingError(f"{message}\n" + "\n".join(lines), hint=hint))

    def _is_quantised(self, entry: Entry) -> str:
        """Why no delta can be added to a weight that the model has in integers, under its own name or a quantiser's."""
        for name, reason in undecoded(self.model).items():
            if name == entry.name or name.endswith(f".{entry.name}"):
                return reason
        names = (entry.name, f"{entry.name}_quantized", f"{entry.name}_Q4", f"{entry.module}.qweight")
        found = [self.model.graph.initializers.get(name) for name in names]
        integers = [value for value in found if value and value.dtype is not None and value.dtype.is_integer()]
        return f"nothing that is known decodes the integers of {integers[0].name!r}" if integers else ""

    def _refuse_conflicts(self, before: Sequence[Binding]) -> None:
        """Rule 5: per site one replacement of all, and one change of each adapter."""
        taken: dict[tuple[object, ...], Binding] = {}
        for binding in (*before, *self.result.bindings):
            site, replaces = binding.site, binding.delta.replaces
            place = (site.initializer, site.layout, site.consumer, replaces)
            other = taken.setdefault(place if replaces else (*place, binding.adapter), binding)
            if other is binding or (replaces and _disjoint(other, binding)):
                continue
            what = "both replace" if replaces else "both change"
            self.errors.append(
                BindingError(
                    f"{site.name}: {_origin(other)} and {_origin(binding)} {what} the same weight.",
                    hint="Give one of them, or rename with --map." if replaces else "Rename one with --map.",
                )
            )


def _rank(site: Site) -> int:
    return _SOURCES.index(site.source) if site.source in _SOURCES else len(_SOURCES)


def _origin(binding: Binding) -> str:
    return f"{binding.key} of adapter {binding.adapter!r}"


def _disjoint(first: Binding, second: Binding) -> bool:
    """Token rows of two adapters that have no token in common."""
    one, two = first.delta, second.delta
    if not isinstance(one, RowReplacement) or not isinstance(two, RowReplacement) or first.adapter == second.adapter:
        return False
    return not set(one.rows.tolist()) & set(two.rows.tolist())


def _unmatched_line(entry: Entry, candidates: Sequence[str], reason: str) -> str:
    near = f"; nearest: {', '.join(candidates)}" if candidates else ""
    near = f": {reason}" if reason else near
    return f"  {entry.name} ({', '.join(entry.keys)}){near}"
