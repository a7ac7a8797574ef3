"""Key grammars as data: which ending of a key means which role, and every key used once.

A format is a table of :class:`KeyRule`. ``group`` sorts a file's keys by module path and role; what no rule knows stays
in ``rest``, and a reader that does not account for all of it fails with ``unknown_keys``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.formats.tensors import some

__all__ = ["Grouped", "KeyRule", "Keyed", "group", "unknown_keys"]


@dataclass(frozen=True)
class Keyed:
    """A tensor and the key it has in the file."""

    key: str
    array: Array


@dataclass(frozen=True)
class KeyRule:
    """One line of a grammar.

    Attributes:
        role: What the tensor is: "A", "B", "magnitude".
        tail: How its key ends; what stands before, without the dot, is the module path. A group ``name`` in it is an
            adapter's name in the middle of the key (PEFT's in-memory ``lora_A.default.weight``).
    """

    role: str
    tail: re.Pattern[str]


@dataclass
class Grouped:
    """A file's tensors by module path and role, in the file's order.

    Attributes:
        modules: {module path: {role: tensor}}.
        rest: What no rule knows, by key.
        adapter: The adapter name that stood in the keys; "" where there was none.
    """

    modules: dict[str, dict[str, Keyed]] = field(default_factory=dict)
    rest: dict[str, Array] = field(default_factory=dict)
    adapter: str = ""


def group(path: Path, tensors: Mapping[str, Array], rules: Sequence[KeyRule], prefixes: Sequence[str] = ()) -> Grouped:
    """Sort tensors by the first rule whose tail ends their key.

    Args:
        path: For messages.
        tensors: By key.
        rules: The grammar, tried in order.
        prefixes: Wrappers that the format puts before every module path; the first that fits is dropped.

    Raises:
        InputError: Two keys have one module and role, or the keys name several adapters.
    """
    grouped = Grouped()
    names: dict[str, str] = {}
    for key, array in tensors.items():
        short = next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)
        rule, match = _first(rules, short)
        if rule is None or match is None:
            grouped.rest[short] = array
            continue
        if "name" in rule.tail.groupindex:
            names.setdefault(match["name"] or "", key)
        roles = grouped.modules.setdefault(short[: match.start()].rstrip("."), {})
        if rule.role in roles:
            raise InputError(f"{path}: {key!r} and {roles[rule.role].key!r} are the same tensor of one module.")
        roles[rule.role] = Keyed(key, array)
    if len(names) > 1:
        listed = some(f"{name or 'none'} ({key})" for name, key in names.items())
        raise InputError(
            f"{path}: the keys name {len(names)} adapters: {listed}.",
            hint="Save one adapter by itself (save_pretrained(..., selected_adapters=[NAME])).",
        )
    grouped.adapter = next(iter(names), "")
    return grouped


def _first(rules: Sequence[KeyRule], key: str) -> tuple[KeyRule | None, re.Match[str] | None]:
    for rule in rules:
        match = rule.tail.search(key)
        if match:
            return rule, match
    return None, None


def unknown_keys(path: Path, format_name: str, keys: Iterable[str], why: str = "") -> InputError:
    """The refusal of what nobody consumed: a key that is skipped is a part of the adapter that is lost."""
    listed = list(keys)
    reason = f" {why}" if why else ""
    return InputError(
        f"{path}: {len(listed)} keys are not part of a {format_name} adapter as loracc knows it, and none is skipped: "
        f"{some(listed)}.{reason}",
        hint="Save the adapter again with the library that trained it, or report the format.",
    )
