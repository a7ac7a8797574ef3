"""``NAME=PATH@0.7``: how a user names an adapter on the command line."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from loracc.errors import InputError

__all__ = ["AdapterSpec", "parse_adapter_spec"]

_NAME = re.compile(r"[\w.+-]+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterSpec:
    """What a user asked for: an adapter's path, the name to give it, and its strength."""

    name: str | None
    path: str
    weight: float = 1.0


def parse_adapter_spec(text: str) -> AdapterSpec:
    """Take ``NAME=PATH@WEIGHT`` apart; NAME and WEIGHT are optional.

    Both ``=`` and ``@`` may be part of a path: the longest reading that exists on disk wins, and ``./`` before a path
    settles what ``NAME=`` would take for a name.

    Raises:
        InputError: The path is empty, or the weight is zero or not finite.

    >>> parse_adapter_spec("style=loras/style@0.7")
    AdapterSpec(name='style', path='loras/style', weight=0.7)
    """
    for name, path, weight in _readings(text):
        if path and os.path.exists(path):
            return AdapterSpec(name, path, _checked(text, weight))
    name, path, weight = _readings(text)[-1]  # nothing exists: take it as written, so that the error names the path
    if not path:
        raise InputError(f"adapter {text!r}: the path is empty.", hint="Write it as PATH, NAME=PATH or NAME=PATH@0.7.")
    return AdapterSpec(name, path, _checked(text, weight))


def _readings(text: str) -> list[tuple[str | None, str, str | None]]:
    """(name, path, weight) in every way the text can be read, the one with the longest path first."""
    named: list[tuple[str | None, str]] = [(None, text)]
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name):
        named.append((name, rest))
    readings: list[tuple[str | None, str, str | None]] = [(name, path, None) for name, path in named]
    for found, path in named:
        before, at, weight = path.rpartition("@")
        if at and _NUMBER.fullmatch(weight):
            readings.append((found, before, weight))
    return readings


def _checked(text: str, weight: str | None) -> float:
    value = 1.0 if weight is None else float(weight)
    if not math.isfinite(value):
        raise InputError(f"adapter {text!r}: the weight {weight} is not a finite number.")
    if value == 0.0:
        raise InputError(f"adapter {text!r}: a weight of 0 folds nothing.", hint="Leave the adapter out instead.")
    return value
