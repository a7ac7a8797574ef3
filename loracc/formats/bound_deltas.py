"""Deltas that have found their sites, in one safetensors file: what a deployment folds when a variant is loaded.

An adapter's own file must be read by its format and bound by name; this one needs neither. Any kind of delta is kept,
since a delta is a frozen dataclass of arrays, numbers and other deltas: its arrays become tensors (equal ones are
stored once), everything else is JSON in the file's metadata. Nothing is unpickled and no class is looked up outside the
table of kinds.

::

    {"version": 1, "bindings": [{"site": {...}, "adapter": "style", "key": "fc.weight", "way": "name",
                                 "delta": {"class": "LowRank", "fields": {"a": {"tensor": "0"}, "b": ..., "s": 2.0}}}]}
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from loracc.adapter import Delta, PendingDelta
from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.folded import Binding
from loracc.formats.tensors import check_tensors, read_tensors
from loracc.formats.write_tensors import write_tensors
from loracc.sites import Layout, Site

__all__ = ["KEY", "read_bindings", "write_bindings"]

#: The one metadata string of the file.
KEY = "loracc.bindings"
_VERSION = 1
_PLAIN = (bool, int, float, str, type(None))
_WAYS = ("recorded", "name", "scope", "content", "map", "graph")


def write_bindings(path: Path, bindings: Sequence[Binding]) -> None:
    """Write the file; the same bindings give the same bytes.

    Raises:
        UnsupportedError: A delta holds what no file can.
    """

    writer = _Writer()
    rows = [
        {
            "site": dataclasses.asdict(binding.site),
            "adapter": binding.adapter,
            "key": binding.key,
            "way": binding.way,
            "delta": writer.encode(binding.delta, binding.site.name),
        }
        for binding in bindings
    ]
    text = json.dumps({"version": _VERSION, "bindings": rows}, separators=(",", ":"))
    write_tensors(path, writer.tensors, {KEY: text})


def read_bindings(path: Path) -> list[Binding]:
    """Read the file; its arrays stay mapped until they are looked at.

    Raises:
        InputError: Missing, truncated, not written by :func:`write_bindings`, or contradicting itself.
        NumericsError: A tensor holds inf or NaN.
    """
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise InputError(
            f"{path}: a safetensors file without {KEY!r}: no stored variant.",
            hint="An adapter becomes one with: loracc attach MODEL ADAPTER --as variants -o OUT.onnx",
        )
    try:
        content = json.loads(metadata[KEY])
        if content["version"] != _VERSION:
            raise InputError(
                f"{path}: written in version {content['version']!r:.20} of its format; this loracc reads {_VERSION}.",
                hint="Attach the adapter again with this version.",
            )
        check_tensors(path, {name: array for name, array in tensors.items() if array.dtype.kind not in "iub"})
        return [_binding(row, tensors) for row in content["bindings"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: damaged: its {KEY!r} does not hang together ({type(error).__name__}: {error}).",
            hint="Attach the adapter again.",
        ) from error


class _Writer:
    """Values to JSON, arrays to tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Array] = {}
        self._names: dict[tuple[str, tuple[int, ...], str], str] = {}

    def encode(self, value: Any, where: str) -> Any:
        if isinstance(value, np.ndarray):
            return {"tensor": self._tensor(value)}
        if isinstance(value, PendingDelta):
            raise AssertionError(f"{where}: a pending delta was not resolved when it was bound")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if _classes().get(type(value).__name__) is not type(value):
                raise UnsupportedError(f"{where}: a {type(value).__name__} cannot be stored as a variant.")
            fields = {field.name: self.encode(getattr(value, field.name), where) for field in dataclasses.fields(value)}
            return {"class": type(value).__name__, "fields": fields}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, tuple | list):
            return {type(value).__name__: [self.encode(item, where) for item in value]}
        if isinstance(value, Mapping):
            return {"map": {str(key): self.encode(item, where) for key, item in value.items()}}
        if isinstance(value, _PLAIN):
            return value
        raise UnsupportedError(f"{where}: a {type(value).__name__} cannot be stored as a variant.")

    def _tensor(self, array: Array) -> str:
        array = np.ascontiguousarray(array)
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        name = self._names.setdefault((digest, array.shape, str(array.dtype)), str(len(self._names)))
        self.tensors[name] = array
        return name


def _binding(row: Any, tensors: Mapping[str, Array]) -> Binding:
    delta = _decode(row["delta"], tensors)
    if not isinstance(delta, Delta):
        raise TypeError("a delta is expected")
    site = row["site"]
    layout = _checked(Layout, {**site["layout"], "perm": tuple(site["layout"]["perm"])})
    if row["way"] not in _WAYS:
        raise ValueError(f"way {row['way']!r:.20}")
    found: Site = _checked(Site, {**site, "layout": layout})
    return Binding(found, delta, str(row["adapter"]), str(row["key"]), str(row["way"]))


def _decode(value: Any, tensors: Mapping[str, Array]) -> Any:
    if not isinstance(value, dict):
        if not isinstance(value, _PLAIN):
            raise TypeError(f"a JSON {type(value).__name__}")
        return value
    ((tag, content),) = [item for item in value.items() if item[0] != "fields"]
    if tag == "tensor":
        return tensors[content]
    if tag in ("tuple", "list"):
        items = [_decode(item, tensors) for item in content]
        return tuple(items) if tag == "tuple" else items
    if tag == "map":
        return {key: _decode(item, tensors) for key, item in content.items()}
    if tag != "class":
        raise ValueError(f"tag {tag!r:.20}")
    return _checked(_classes()[content], {key: _decode(item, tensors) for key, item in value["fields"].items()})


def _checked(cls: type[Any], fields: dict[str, Any]) -> Any:
    """An instance whose fields have the declared types."""
    hints = typing.get_type_hints(cls)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{cls.__name__}.{name} is a {type(value).__name__}")
    return cls(**fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as the kinds' dataclasses write them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        return len(kinds) == len(value) and all(_fits(item, kind) for item, kind in zip(value, kinds, strict=True))
    if origin is not None and isinstance(origin, type):
        return isinstance(value, origin)  # an ndarray of some dtype, a Mapping of something
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


@cache
def _classes() -> dict[str, type[Any]]:
    """Every kind of delta by the name of its class, and the settings that kinds hold."""
    import loracc.deltas
    import loracc.kinds
    from loracc.kinds.combined import Recipe

    for module in pkgutil.iter_modules(loracc.kinds.__path__):
        importlib.import_module(f"loracc.kinds.{module.name}")
    found: dict[str, type[Any]] = {"Recipe": Recipe}
    waiting: list[type[Any]] = [Delta]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.__module__.startswith(("loracc.deltas", "loracc.kinds.")) and dataclasses.is_dataclass(cls):
            found[cls.__name__] = cls
    return found
