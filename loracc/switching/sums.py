"""``--sum NAME=a+b@0.5``: one adapter that is the exact weighted sum of others, by putting their ranks side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loracc.errors import InputError
from loracc.folded import Binding
from loracc.switching.request import Bound

__all__ = ["Part", "parse_sums", "summed"]

_NAME = re.compile(r"[\w.+-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Part:
    """An adapter in a sum, and its weight there."""

    bound: Bound
    weight: float


def parse_sums(texts: Sequence[str], bound: Sequence[Bound]) -> dict[str, tuple[Part, ...]]:
    """``NAME=a+b@0.5`` in terms of the adapters' names.

    Raises:
        InputError: Malformed, a name that no adapter has, or a name that is taken.
    """
    known = {one.name: one for one in bound}
    found: dict[str, tuple[Part, ...]] = {}
    for text in texts:
        name, equals, terms = text.partition("=")
        if not equals or not name or not terms:
            raise InputError(f"--sum {text}: expected NAME=a+b or NAME=a@0.7+b@0.3, with the adapters' names.")
        if not _NAME.fullmatch(name):
            raise InputError(
                f"--sum {text}: {name!r:.120} cannot be the name of a file beside the output.",
                hint="Up to 100 letters, digits, and . _ + - make a NAME.",
            )
        if name in known or name in found:
            raise InputError(f"--sum {text}: there is an adapter {name!r} already.", hint="Choose another NAME.")
        found[name] = tuple(_part(text, term, known) for term in _terms(terms, known))
    return found


def _terms(text: str, known: dict[str, Bound]) -> list[str]:
    """Split at every "+" but those inside a name that an adapter has."""
    terms: list[str] = []
    for piece in text.split("+"):
        joined = f"{terms[-1]}+{piece}" if terms else piece
        if terms and terms[-1] not in known and "@" not in terms[-1]:
            terms[-1] = joined
        else:
            terms.append(piece)
    return terms


def _part(text: str, term: str, known: dict[str, Bound]) -> Part:
    name, at, weight = term.rpartition("@")
    name, weight = (name, weight) if at else (term, "1")
    if name not in known:
        raise InputError(
            f"--sum {text}: no adapter is named {name!r}.",
            hint=f"Their names: {', '.join(known)} (NAME=PATH names one).",
        )
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0.0:
        raise InputError(f"--sum {text}: the weight {weight!r} is no finite number other than zero.")
    return Part(known[name], value)


def summed(parts: Sequence[Part]) -> list[Binding]:
    """The deltas of a sum, each at its weight."""
    return [
        binding if part.weight == 1.0 else replace(binding, delta=binding.delta.scaled(part.weight))
        for part in parts
        for binding in part.bound.bindings
    ]
