"""Whether a manifest's JSON has the form that loracc writes: every field, before anything is made of it.

The file may be damaged, of another version, or written by somebody with a purpose; what is wrong is named by where it
is: ``weights['fc.weight'].places[0].at``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from loracc.targets.tensorrt_module import FLAVORS

__all__ = ["check_body"]

#: Raises ValueError unless the value (first) is as it should be; the second says where it is.
Check = Callable[[Any, str], None]
#: Above any size of a file, and within what numpy indexes with.
_LARGEST = 1 << 62


def _one(test: Callable[[Any], bool], expected: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not test(value):
            raise ValueError(f"{where} is {repr(value)[:60]}, expected {expected}")

    return check


def _list(item: Check, length: int | None = None) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise ValueError(f"{where} is {repr(value)[:60]}, expected a list" + (f" of {length}" if length else ""))
        for index, one in enumerate(value):
            item(one, f"{where}[{index}]")

    return check


def _each(item: Check) -> Check:
    """An object with any keys."""

    def check(value: Any, where: str) -> None:
        _object(value, where)
        for key, one in value.items():
            item(one, f"{where}[{key!r}]")

    return check


def _fields(fields: Mapping[str, Check], *, more: Check | None = None, optional: tuple[str, ...] = ()) -> Check:
    """An object with these fields, and others only with ``more``."""

    def check(value: Any, where: str) -> None:
        _object(value, where)
        dot = f"{where}." if where else ""
        if missing := sorted(fields.keys() - value.keys() - set(optional)):
            raise ValueError(f"{dot}{missing[0]} is missing")
        for key, one in value.items():
            known = fields.get(key, more)
            if known is None:
                raise ValueError(f"{dot}{key} is not known")
            known(one, f"{dot}{key}")

    return check


def _object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {repr(value)[:60]}, expected an object")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_name_of_a_file(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not re.search(r"[/\\\0]", value)


_text = _one(lambda value: isinstance(value, str), "a text")
_whole = _one(_is_whole, "a whole number")
_shape = _list(_whole)
_flag = _one(lambda value: isinstance(value, bool), "true or false")
_digest = _one(lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, "a sha256")
_dtype = _one(lambda value: isinstance(value, str) and value in ir.DataType.__members__, "an ONNX type")
_scalar = _one(lambda value: value is None or isinstance(value, bool | int | str), "a number, a text or null")
_place = _fields(dict.fromkeys(("at", "rows", "run", "stride"), _whole))

#: Fields of :class:`loracc.targets.tensorrt_manifest.Manifest`.
_BODY = _fields(
    {
        "flavor": _one(lambda value: isinstance(value, str) and value in FLAVORS, f"one of {', '.join(FLAVORS)}"),
        "version": _text,
        "gpu": _one(lambda value: value is None or isinstance(value, str), "a text or null"),
        "model": _one(_is_name_of_a_file, "the name of a file"),
        "plan_sha256": _digest,
        "plan_bytes": _whole,
        "graph_sha256": _digest,
        "adapters": _list(_text),
        "sites": _list(_text),
        "inputs": _list(
            _fields(
                {
                    "name": _text,
                    "dtype": _dtype,
                    "shape": _list(
                        _one(lambda value: isinstance(value, str) or _is_whole(value), "a whole number or a symbol")
                    ),
                }
            )
        ),
        "profiles": _list(_each(_list(_shape, 3))),
        "options": _fields(
            {
                "refittable": _one(
                    lambda value: isinstance(value, str) and value in ("none", "adapter", "all"), "none, adapter or all"
                ),
                "marked": _list(_text),
                "version_compatible": _flag,
            },
            more=_scalar,
        ),
        "repeats": _each(_whole),
        "weights": _each(
            _fields({"dtype": _dtype, "shape": _shape, "sha256": _digest, "nbytes": _whole, "places": _list(_place)})
        ),
        "memory": _text,
        "loracc": _text,
    },
    optional=("repeats", "memory", "loracc"),
)


def check_body(body: Any) -> None:
    """Check everything but the format's number.

    Raises:
        ValueError: It has another form; where and what was expected.

    >>> check_body({"flavor": "rtx"})
    Traceback (most recent call last):
    ValueError: adapters is missing
    """
    _BODY(body, "")
