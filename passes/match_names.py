"""Which parameter of the model an adapter's name means: by map, exactly, or behind one wrapper's prefix.

1. ``--map OLD=NEW`` renames first: OLD is a whole path or a prefix of one that ends at a dot.
2. A name that a site has is that site's.
3. What is left over is looked for behind *one* rewriting "strip P, add Q", the same for all of it. Where P or Q is
   empty (the adapter was trained with a wrapper around the model, or on a part of it), and where both are made of
   wrappers' usual names, it is applied. Any other rewriting might turn a decoder's adapter into an encoder's: it is
   suggested, and the user says it with ``--map``.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from loracc.errors import BindingError, InputError

__all__ = ["Matching", "Rewriting", "apply_maps", "match_names", "nearest", "parse_maps"]

#: Module names that only wrap: they tell nothing about which part of the model is meant.
WRAPPERS = frozenset(
    {"base_model", "model", "module", "language_model", "transformer", "text_model", "backbone", "_orig_mod", "network"}
)


@dataclass(frozen=True)
class Rewriting:
    """Strip ``old`` from the front of a path and put ``new`` there; both at a dot, "" for the root."""

    old: str
    new: str

    def apply(self, name: str) -> str | None:
        """The new name, None where ``old`` does not lead it.

        >>> Rewriting("model", "bert").apply("model.layer.0.query.weight")
        'bert.layer.0.query.weight'
        """
        if self.old and not name.startswith(f"{self.old}."):
            return None
        rest = name.removeprefix(f"{self.old}.") if self.old else name
        return f"{self.new}.{rest}" if self.new else rest

    @property
    def only_wraps(self) -> bool:
        """Whether it takes away or adds nothing but a wrapper."""
        return not self.old or not self.new or set(f"{self.old}.{self.new}".split(".")) <= WRAPPERS

    def __str__(self) -> str:
        return f"{self.old or '(root)'} -> {self.new or '(root)'}"


@dataclass(frozen=True)
class Matching:
    """What ``match_names`` found.

    Attributes:
        found: {adapter's name: site's name}.
        unmatched: Names that no site has, in order.
        rewriting: What rule 3 applied; None when every name was found as it is.
        suggestion: A rewriting that would bind more and that only the user can confirm.
    """

    found: dict[str, str]
    unmatched: tuple[str, ...]
    rewriting: Rewriting | None = None
    suggestion: Rewriting | None = None


def parse_maps(maps: Sequence[str]) -> list[Rewriting]:
    """``OLD=NEW`` texts.

    Raises:
        InputError: One has no ``=``, or both sides are empty.
    """
    parsed = []
    for text in maps:
        old, equals, new = (part.strip(". ") for part in text.partition("="))
        if not equals or not (old or new):
            raise InputError(f"--map {text!r}: expected OLD=NEW, two module paths or prefixes of module paths.")
        parsed.append(Rewriting(old, new))
    return parsed


def apply_maps(name: str, maps: Iterable[Rewriting]) -> str | None:
    """The name under the first map that fits it (whole, or a prefix at a dot); None when none does."""
    for rewriting in maps:
        if name == rewriting.old:
            return rewriting.new
        renamed = rewriting.apply(name)
        if renamed is not None:
            return renamed
    return None


def match_names(names: Sequence[str], known: Collection[str]) -> Matching:
    """Rules 2 and 3 for all names of one adapter.

    Args:
        names: Adapter's parameter names, maps already applied.
        known: The sites' names.

    Raises:
        BindingError: Two rewritings would bind equally much.
    """
    known = set(known)
    found = {name: name for name in names if name in known}
    rest = [name for name in names if name not in known]
    if not rest:
        return Matching(found, ())
    ranked = _ranked(rest, known - set(found.values()))
    wrapping = [(rewriting, count) for rewriting, count in ranked if rewriting.only_wraps]
    best = _best(wrapping, rest)
    if best is not None:
        found |= {name: new for name in rest if (new := best.apply(name)) in known and new is not None}
    unmatched = tuple(name for name in rest if name not in found)
    others = [item for item in ranked if not item[0].only_wraps]
    suggestion = others[0][0] if unmatched and len(others) == 1 else None
    return Matching(found, unmatched, best, suggestion)


def _ranked(names: Sequence[str], known: set[str]) -> list[tuple[Rewriting, int]]:
    """Rewritings that bind the most of these names, each with how many it binds."""
    by_tail: dict[str, list[str]] = {}
    for site in sorted(known):
        by_tail.setdefault(_tail(site), []).append(site)
    proposed = Counter(
        rewriting for name in names for rewriting in {_rewriting(name, site) for site in by_tail.get(_tail(name), ())}
    )
    counted = []
    # A name proposes the shortest rewritings that bind it: one that binds many is proposed by many. The rest is not
    # tried: for a model of a hundred layers it would be a hundred for each name.
    for rewriting in _most_proposed(proposed):
        targets = [new for name in names if (new := rewriting.apply(name)) in known]
        if len(set(targets)) == len(targets):
            counted.append((rewriting, len(targets)))
    most = {wraps: max((n for r, n in counted if r.only_wraps == wraps), default=0) for wraps in (True, False)}
    return [(r, n) for r, n in counted if n == most[r.only_wraps]]


def _most_proposed(proposed: Counter[Rewriting], limit: int = 32) -> list[Rewriting]:
    ordered = [rewriting for rewriting, _ in proposed.most_common()]
    wrapping, others = [r for r in ordered if r.only_wraps], [r for r in ordered if not r.only_wraps]
    return [*wrapping[:limit], *others[:limit]]


def _best(ranked: Sequence[tuple[Rewriting, int]], names: Sequence[str]) -> Rewriting | None:
    if len(ranked) > 1:
        shown = "; ".join(f"{names[0]} as {rewriting.apply(names[0]) or '?'} ({rewriting})" for rewriting, _ in ranked)
        raise BindingError(
            f"the adapter fits the model in {len(ranked)} ways: {shown}.",
            hint=f"Say which is meant: --map {ranked[0][0].old}={ranked[0][0].new}",
        )
    return ranked[0][0] if ranked else None


def _tail(name: str) -> str:
    """The last module and the parameter: what a rewriting leaves alone."""
    return ".".join(name.split(".")[-2:])


def _rewriting(name: str, site: str) -> Rewriting:
    """The shortest rewriting that turns one name into the other: their common end stays."""
    left, right = name.split("."), site.split(".")
    common = 0
    while common < min(len(left), len(right)) and left[-1 - common] == right[-1 - common]:
        common += 1
    return Rewriting(".".join(left[: len(left) - common]), ".".join(right[: len(right) - common]))


def nearest(name: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """The names that look most like this one: those with the same end first."""
    parts = name.split(".")
    for count in (3, 2, 1):
        ends = [site for site in known if site.split(".")[-count:] == parts[-count:]]
        if ends and len(parts) >= count:
            return difflib.get_close_matches(name, ends[:100], n=limit, cutoff=0.0)
    return difflib.get_close_matches(name, known[:200], n=limit, cutoff=0.4)
