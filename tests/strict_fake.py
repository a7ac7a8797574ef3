"""Fakes of a library that cannot run here, held to the signatures of the one that is installed.

A class derived from :class:`Strict` names the real class. Every public method and property that it has must exist
there, and every call must fit one of the real method's overloads, as pybind writes them into its docstring: in number,
in names and in types. A call that the library would refuse fails the test.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["Strict", "overloads"]

_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "typing.SupportsInt": (int,),
    "typing_extensions.Buffer": (bytes, bytearray, memoryview),
}


def overloads(method: Any, name: str) -> list[list[tuple[str, str, bool]]]:
    """(parameter, type, has a default) of each overload of a pybind method, without ``self``."""
    found = []
    for text in re.findall(rf"^\s*(?:\d+\. )?{re.escape(name)}\((self: .*)\) -> ", method.__doc__ or "", re.MULTILINE):
        parameters = [part.partition(": ") for part in re.split(r", (?=\w+: )", text)]
        found.append([(key, kind.partition(" = ")[0], " = " in kind) for key, _, kind in parameters[1:]])
    return found


def _fits(overload: list[tuple[str, str, bool]], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    names = [key for key, _, _ in overload]
    if len(arguments) > len(names) or set(keywords) - set(names[len(arguments) :]):
        return False
    given = dict(zip(names, arguments, strict=False)) | keywords
    if any(key not in given and not optional for key, _, optional in overload):
        return False
    return all(_is(given[key], kind) for key, kind, _ in overload if key in given)


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of the type of that name: a plain one, or the library's own or its fake."""
    if kind in _PLAIN:
        return isinstance(value, _PLAIN[kind])
    name = kind.rpartition(".")[2]
    own = [cls.__name__ for cls in type(value).__mro__]
    return name in own or (isinstance(value, Strict) and value.real.__name__ == name)


class Strict:
    """Derive from it with ``real=`` the class that is faked."""

    real: ClassVar[type]

    def __init_subclass__(cls, *, real: type) -> None:
        cls.real = real
        for name, member in list(vars(cls).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if name in ("real",):
                continue
            there = getattr(real, name, None)
            if there is None:
                raise AssertionError(f"{real.__name__} has no {name}")
            if isinstance(member, property):
                if not isinstance(there, property):
                    raise AssertionError(f"{real.__name__}.{name} is no property")
            else:
                setattr(cls, name, _checked(member, there, f"{real.__name__}.{name}", name))


def _checked(fake: Callable[..., Any], there: Any, where: str, name: str) -> Callable[..., Any]:
    known = overloads(there, name)
    if not known:
        raise AssertionError(f"{where}: its docstring has no signature")

    @functools.wraps(fake)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not any(_fits(overload, arguments, keywords) for overload in known):
            raise AssertionError(f"{where} does not take {arguments} {keywords}: {known}")
        return fake(self, *arguments, **keywords)

    return call
