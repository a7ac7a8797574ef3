"""Optimization profiles, checked before the builder sees them.

TensorRT accepts a profile of an unknown input, reports min > max only as a failed build, and builds a dynamic network
without a profile to nothing at all; each of these is found here, by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.errors import InputError, LoraccError, combined

__all__ = ["Profile", "parse_profiles"]

_SHAPE = r"\d+(?:x\d+)*|"
_SPEC = re.compile(rf"(?P<name>.+):(?P<min>{_SHAPE}):(?P<opt>{_SHAPE}):(?P<max>{_SHAPE})")

#: The largest size of an axis: a larger one builds, and is another one then.
_LARGEST = 2**31 - 1

Shape = tuple[int, ...]
#: Input name -> (min, opt, max).
Profile = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class _Range:
    text: str
    name: str
    shapes: tuple[Shape, Shape, Shape]


def parse_profiles(specs: Sequence[str], inputs: Sequence[ir.Value]) -> list[Profile]:
    """``NAME:MIN:OPT:MAX`` for each dynamic input, shapes as ``1x128``; the k-th one of a name is for the k-th profile.

    Args:
        specs: As given on the command line.
        inputs: The graph's inputs.

    Returns:
        The profiles; none for a graph without dynamic inputs.

    Raises:
        InputError: A spec is malformed, names no input, does not fit its shape, or a dynamic input has none.

    >>> x = ir.Value(name="x", shape=ir.Shape(["batch", 4]))
    >>> parse_profiles(["x:1x4:2x4:8x4"], [x])
    [{'x': ((1, 4), (2, 4), (8, 4))}]
    """
    known = {str(value.name): value for value in inputs}
    errors: list[LoraccError] = []
    ranges: list[_Range] = []
    for text in specs:
        try:
            ranges.append(_checked(_parse(text), known))
        except InputError as error:
            errors.append(error)
    count = max([sum(r.name == name for r in ranges) for name in known] or [0])
    for name in known:
        given = sum(r.name == name for r in ranges)
        if _is_dynamic(known[name]) and given < max(count, 1) and not any(name in error.message for error in errors):
            errors.append(_missing(known[name], given, count))
    if errors:
        raise combined(errors)
    profiles: list[Profile] = [{} for _ in range(count)]
    for name in known:
        own = [r.shapes for r in ranges if r.name == name]
        for profile, shapes in zip(profiles, own or [], strict=False):
            profile[name] = shapes
    return profiles


def _parse(text: str) -> _Range:
    match = _SPEC.fullmatch(text)
    if match is None:
        raise InputError(
            f"--profile {text}: expected NAME:MIN:OPT:MAX with shapes such as 1x128.",
            hint="Example: --profile input_ids:1x1:1x128:8x512",
        )
    shapes = tuple(tuple(int(n) for n in match[part].split("x") if n) for part in ("min", "opt", "max"))
    return _Range(text, match["name"], (shapes[0], shapes[1], shapes[2]))


def _checked(given: _Range, known: dict[str, ir.Value]) -> _Range:
    value = known.get(given.name)
    if value is None:
        raise InputError(
            f"--profile {given.text}: the graph has no input {given.name!r}.", hint=f"Its inputs: {', '.join(known)}"
        )
    shape = value.shape
    dims = list(shape) if shape is not None else []
    if any(len(part) != len(dims) for part in given.shapes):
        raise InputError(f"--profile {given.text}: input {given.name!r} has {len(dims)} axes: {shape}.")
    for axis, (low, best, high) in enumerate(zip(*given.shapes, strict=True)):
        if not low <= best <= high:
            raise InputError(f"--profile {given.text}: axis {axis} is not min ≤ opt ≤ max: {low}, {best}, {high}.")
        if high > _LARGEST:
            raise InputError(f"--profile {given.text}: axis {axis} is {high}, and TensorRT takes at most {_LARGEST}.")
        fixed = dims[axis]
        if isinstance(fixed, int) and {low, best, high} != {fixed}:
            raise InputError(f"--profile {given.text}: axis {axis} of {given.name!r} is fixed at {fixed}.")
    return given


def _is_dynamic(value: ir.Value) -> bool:
    return value.shape is None or any(not isinstance(dim, int) for dim in value.shape)


def _missing(value: ir.Value, given: int, count: int) -> InputError:
    nth = f" in profile {given + 1} of {count}" if count > 1 else ""
    return InputError(
        f"input {value.name!r} has a dynamic shape {value.shape} and no range{nth}: nothing is built without one.",
        hint=f"Add --profile {value.name}:MIN:OPT:MAX, for example {_example(value)}",
    )


def _example(value: ir.Value) -> str:
    dims = list(value.shape) if value.shape is not None else []
    parts = ["x".join(str(dim if isinstance(dim, int) else size) for dim in dims) for size in (1, 8, 64)]
    return f"{value.name}:{':'.join(parts)}"
