"""What a format reader needs to know about a kind: its keys, its configuration, and how to build it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from loracc.adapter import Delta, PendingDelta
from loracc.dtypes import Array
from loracc.errors import BindingError, InputError

__all__ = ["Build", "Config", "KindSpec", "number", "pattern_value", "pending", "take", "take64"]

Config = Mapping[str, object]

#: ``build(arrays by role, config, module path) -> changes by parameter name``. Shared tensors are among the arrays.
#: A change may be a :class:`~loracc.adapter.PendingDelta`.
Build = Callable[[Mapping[str, Array], Config, str], dict[str, Delta]]


@dataclass(frozen=True)
class KindSpec:
    """One adapter kind as files have it.

    Attributes:
        name: The kind's name in messages.
        roles: Tail of a tensor's key (behind the module path) -> the role ``build`` knows it by.
        build: Makes the changes of one module.
        shared: Keys of tensors that belong to no module, without wrapper prefixes -> role.
        shared_prefixes: Beginnings of such keys that a group's name follows -> beginning of the role it follows.
        optional: Parameters among the changes that a module may lack (a layer without bias).
        config: Fields of the configuration that change the result, for provenance and checks.
        layers: What PEFT adapts with it: "linear", "conv1d_hf", "conv1d", "conv2d", "conv3d", "embedding".
        needs: An optional package that ``build`` needs, else "".
    """

    name: str
    roles: Mapping[str, str]
    build: Build
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_prefixes: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    config: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("linear",)
    needs: str = ""

    def shared_role(self, key: str) -> str | None:
        """The role of a tensor that belongs to no module; None when the kind has no such tensor."""
        for prefix, role in self.shared_prefixes.items():
            if key.startswith(prefix):
                return role + key.removeprefix(prefix)
        return self.shared.get(key)


def pattern_value(config: Config, pattern: str, default: str, module: str) -> object:
    """A per-module value: of the first key of ``config[pattern]`` that matches the path, else ``config[default]``.

    Keys match as PEFT's ``get_pattern_key``: ``(.*\\.)?(KEY)$``.
    """
    table = config.get(pattern)
    if isinstance(table, Mapping):
        for key, value in table.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
    return config.get(default)


def number(value: object, what: str, module: str) -> float:
    """A number of the configuration.

    Raises:
        InputError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{module}: {what} is {value!r} in the adapter's configuration; expected a number.")
    return float(value)


def take(arrays: Mapping[str, Array], role: str, kind: str, module: str) -> Array:
    """A tensor that the kind cannot do without.

    Raises:
        InputError: The file lacks it.
    """
    if role not in arrays:
        raise InputError(f"{module}: the {kind} adapter has no tensor {role!r}; found {', '.join(sorted(arrays))}.")
    return arrays[role]


def take64(arrays: Mapping[str, Array], role: str, kind: str, module: str) -> Array:
    """``take``, in float64: what is multiplied into another factor before the fold."""
    return take(arrays, role, kind, module).astype(np.float64)


def pending(arrays: Mapping[str, Array], kind: str, module: str, make: Callable[[tuple[int, ...]], Delta]) -> Delta:
    """A delta that ``make`` builds once the weight's shape is known.

    Raises (from ``resolve``):
        BindingError: The tensors do not make a change of that shape.
    """

    def resolve(shape: tuple[int, ...]) -> Delta:
        try:
            return make(shape)
        except (ValueError, IndexError) as error:
            sizes = ", ".join(f"{role} {list(array.shape)}" for role, array in arrays.items())
            raise BindingError(
                f"{module}: the {kind} tensors ({sizes}) do not fit a weight of {list(shape)}: {error}",
                hint="Is the adapter for another model, or for another layer of this one?",
            ) from error

    return PendingDelta(resolve, arrays, name=kind.lower().replace("-", "").replace(" ", "_"))
