"""Adapters whose names cannot be read backwards: the base's module paths are spelled as the file would spell them.

kohya writes ``encoder.layer.0.query`` as ``encoder_layer_0_query``, and which underscore was a dot nobody can tell;
GGUF has names of its own. ``Adapter.naming`` spells a path; here every path of the base is spelled and looked up:

1. as it is;
2. what is left over, behind *one* prefix that either the base's paths or the file's names have more (a wrapper), the
   one that fits the most names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from loracc.adapter import Adapter, Entry
from loracc.errors import BindingError

__all__ = ["with_base_names"]

Naming = Callable[[str], str | None]


def with_base_names(
    adapter: Adapter, modules: Iterable[str], keep: Callable[[str], bool] = lambda name: False
) -> Adapter:
    """The adapter with the base's own module paths; names that no path is spelled as stay as they are.

    Args:
        adapter: Any adapter; one without ``naming`` is returned as it is.
        modules: The base's module paths.
        keep: Entry names (``module.parameter``) that are settled otherwise (``--map``).

    Raises:
        BindingError: A name is the spelling of several paths.
    """
    naming = adapter.naming
    if naming is None:
        return adapter
    paths = list(dict.fromkeys(path for path in modules if path))
    options = [option for entry in adapter.entries for option in (entry, *entry.alternatives)]
    names = {option.module for option in options if not keep(option.name)}
    found = _spelled(names, paths, naming)
    rest = names - set(found)
    if rest:
        found |= _behind_prefix(rest, paths, naming)
    doubtful = [f"{name} is {' or '.join(targets)}" for name, targets in found.items() if len(targets) > 1]
    if doubtful:
        raise BindingError(
            f"adapter {adapter.name!r}: a name of its file is the spelling of several modules: {'; '.join(doubtful)}.",
            hint="Say which is meant: --map NAME=MODULE",
        )
    known = {name: targets[0] for name, targets in found.items()}
    return replace(adapter, entries=tuple(_renamed(entry, known) for entry in adapter.entries), naming=None)


def _renamed(entry: Entry, known: dict[str, str]) -> Entry:
    others = tuple(_renamed(other, known) for other in entry.alternatives)
    return replace(entry, module=known.get(entry.module, entry.module), alternatives=others)


def _spelled(names: Collection[str], paths: Iterable[str], naming: Naming) -> dict[str, list[str]]:
    """Rule 1: {name: the paths that are spelled so}."""
    found: dict[str, list[str]] = {}
    for path in paths:
        spelling = naming(path)
        if spelling in names:
            found.setdefault(str(spelling), []).append(path)
    return found


def _behind_prefix(names: Collection[str], paths: list[str], naming: Naming) -> dict[str, list[str]]:
    """Rule 2. Two prefixes that fit equally many names are both kept, so that the caller sees the doubt."""
    hits: dict[tuple[str, str], dict[str, str]] = {}
    for path in paths:
        parts = path.split(".")
        for at in range(1, len(parts)):
            spelling = naming(".".join(parts[at:]))
            if spelling in names:
                hits.setdefault(("base", ".".join(parts[:at])), {})[str(spelling)] = path
        whole = naming(path)
        for name in names:
            if whole and name.endswith(f"_{whole}"):
                hits.setdefault(("file", name.removesuffix(f"_{whole}")), {})[name] = path
    if not hits:
        return {}
    most = max(len(found) for found in hits.values())
    merged: dict[str, list[str]] = {}
    for found in (found for found in hits.values() if len(found) == most):
        for name, path in found.items():
            merged.setdefault(name, []).append(path)
    return {name: list(Counter(targets)) for name, targets in merged.items()}
