"""Typed fields of a JSON configuration: a wrong type is an error that names the field, never a guess."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracc.errors import InputError

__all__ = ["integer", "mapping", "names_or_pattern", "number", "optional_list", "switch", "token_indices"]


def _wrong(path: Path, field: str, value: Any, expected: str) -> InputError:
    return InputError(f"{path}: {field} in adapter_config.json is {value!r:.60}, expected {expected}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's integers have no end
        return False


def integer(path: Path, config: Mapping[str, Any], field: str, default: int) -> int:
    """A positive integer."""
    value = config.get(field)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise _wrong(path, field, value, "a positive integer")
    return value


def number(path: Path, config: Mapping[str, Any], field: str, default: float) -> float:
    """A finite number other than zero: with a scale of zero an adapter does nothing, and that is never meant."""
    value = config.get(field)
    value = default if value is None else value
    if not _is_number(value) or value == 0:
        raise _wrong(path, field, value, "a finite number other than 0")
    return float(value)


def switch(path: Path, config: Mapping[str, Any], field: str) -> bool:
    """True or false; absent is false."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path, field, value, "true or false")
    return bool(value)


def mapping(path: Path, config: Mapping[str, Any], field: str, *, whole: bool = False) -> dict[str, Any]:
    """Patterns to numbers (to positive integers when ``whole``), in the file's order: the first hit wins."""
    value = config.get(field)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise _wrong(path, field, value, "an object of pattern: number")
    for pattern, entry in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise _wrong(path, field, pattern, f"a regular expression ({error})") from error
        if not _is_number(entry) or entry == 0 or (whole and (type(entry) is not int or entry < 0)):
            raise _wrong(
                path, f"{field}[{pattern!r}]", entry, "a positive integer" if whole else "a number other than 0"
            )
    return value


def optional_list(path: Path, config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of strings; absent is empty."""
    value = config.get(field)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(path, field, value, "a list of strings")
    return tuple(value)


def names_or_pattern(path: Path, config: Mapping[str, Any], field: str) -> tuple[str, ...] | str:
    """A list of names, in a fixed order (PEFT saves a set), or one regular expression; absent is empty."""
    value = config.get(field)
    if not isinstance(value, str):
        return tuple(sorted(optional_list(path, config, field)))
    try:
        re.compile(value)
    except re.error as error:
        raise _wrong(path, field, value, f"names or a regular expression ({error})") from error
    return value


def token_indices(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """``trainable_token_indices`` by module name; a bare list is the input embedding's and gets the name ""."""
    field = "trainable_token_indices"
    value = config.get(field)
    value = {} if value is None else value
    value = {"": value} if isinstance(value, list) else value
    if not isinstance(value, dict):
        raise _wrong(path, field, value, "a list of token ids, or an object of module: list")
    for module, tokens in value.items():
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise _wrong(path, f"{field}[{module!r}]", tokens, "a list of token ids")
        if len(set(tokens)) != len(tokens):
            raise _wrong(path, f"{field}[{module!r}]", tokens, "token ids without repetition")
    return {module: tuple(tokens) for module, tokens in value.items()}
