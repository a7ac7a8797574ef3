"""Inputs that the user gives: ``--input NAME:DTYPE[SHAPE]``, ``--inputs FILE.npz``, ``--dynamic NAME:AXIS=SYMBOL``."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.model import LoadOptions

__all__ = [
    "DynamicSpec",
    "InputSpec",
    "given_inputs",
    "misfits",
    "parse_dynamic_spec",
    "parse_input_spec",
    "read_npz",
    "sample_array",
]

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_INPUT = re.compile(r"(?P<name>.+):(?P<dtype>\w+)\[(?P<shape>[0-9,\s]*)\]", re.ASCII)
_DYNAMIC = re.compile(r"(?P<name>.+):(?P<axis>\d{1,3})=(?P<symbol>[A-Za-z_]\w*)", re.ASCII)
_SEED = 0


@dataclass(frozen=True)
class InputSpec:
    """One ``--input``: what a traced or sampled input looks like."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DynamicSpec:
    """One ``--dynamic``: an axis of an input that may have any length, and its symbol."""

    name: str
    axis: int
    symbol: str


def parse_input_spec(text: str) -> InputSpec:
    """``"input_ids:int64[2,16]"`` -> its parts; ``"x:float32[]"`` is a scalar.

    >>> parse_input_spec("input_ids:int64[2,16]")
    InputSpec(name='input_ids', dtype=dtype('int64'), shape=(2, 16))

    Raises:
        InputError: The text has another form, an unknown dtype, or a size of zero or beyond memory.
    """
    match = _INPUT.fullmatch(text.strip())
    if not match:
        raise InputError(f"--input {text!r}: expected NAME:DTYPE[SHAPE].", hint="For example: --input x:float32[2,16]")
    if match["dtype"] not in _DTYPES:
        raise InputError(f"--input {text!r}: unknown dtype {match['dtype']!r}.", hint=f"Known: {', '.join(_DTYPES)}.")
    sizes = [part.strip() for part in match["shape"].split(",")] if match["shape"].strip() else []
    if not all(size.isdigit() and len(size) < 10 and int(size) for size in sizes):
        raise InputError(f"--input {text!r}: every size is a positive number.", hint="For example: x:float32[2,16]")
    shape = tuple(int(size) for size in sizes)
    if math.prod(shape) > 1 << 31:
        raise InputError(f"--input {text!r}: {math.prod(shape)} elements are too many.", hint="Give a smaller sample.")
    return InputSpec(match["name"], _DTYPES[match["dtype"]], shape)


def parse_dynamic_spec(text: str) -> DynamicSpec:
    """``"input_ids:1=sequence"`` -> its parts.

    >>> parse_dynamic_spec("input_ids:1=sequence")
    DynamicSpec(name='input_ids', axis=1, symbol='sequence')

    Raises:
        InputError: The text has another form.
    """
    match = _DYNAMIC.fullmatch(text.strip())
    if not match:
        raise InputError(
            f"--dynamic {text!r}: expected NAME:AXIS=SYMBOL.", hint="For example: --dynamic input_ids:1=sequence"
        )
    return DynamicSpec(match["name"], int(match["axis"]), match["symbol"])


def given_inputs(options: LoadOptions, ranges: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Array]:
    """The inputs the user gave, by name: those of the npz file as they are, those of ``--input`` seeded random.

    Args:
        options: Its ``inputs_file`` and ``inputs``.
        ranges: Half-open ranges for integer inputs, by name; without one an integer input is 0 or 1, which every
            vocabulary and every mask allows.

    Raises:
        InputError: A text or the file is malformed, or a name comes twice.
    """
    inputs = read_npz(options.inputs_file) if options.inputs_file else {}
    for text in options.inputs:
        spec = parse_input_spec(text)
        if spec.name in inputs:
            raise InputError(f"input {spec.name!r} is given twice.", hint="Give each input once: --input or --inputs.")
        inputs[spec.name] = sample_array(spec, (ranges or {}).get(spec.name, (0, 2)))
    return inputs


def misfits(value: ir.Value, array: Array) -> list[str]:
    """What of an array is not what an input of a graph takes: its type, its shape."""
    problems = []
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        problems.append(f"{value.name}: {array.dtype}, the model takes {value.dtype.numpy()}")
    if value.shape is not None:
        fits = len(value.shape) == array.ndim and all(
            not isinstance(n, int) or n == m for n, m in zip(value.shape, array.shape, strict=True)
        )
        if not fits:
            problems.append(f"{value.name}: shape {list(array.shape)}, the model takes {value.shape}")
    return problems


def sample_array(spec: InputSpec, integers: tuple[int, int] = (0, 2)) -> Array:
    """A seeded random array: standard normal, or integers in the half-open range."""
    rng = np.random.default_rng([_SEED, *spec.name.encode("utf-8", "surrogateescape")])
    if spec.dtype.kind in "iub":
        return np.asarray(rng.integers(*integers, spec.shape)).astype(spec.dtype)
    return np.asarray(rng.standard_normal(spec.shape)).astype(spec.dtype)


def read_npz(path: str | Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file, in its order; nothing is unpickled.

    Raises:
        InputError: Missing, damaged, another kind, or an array of Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read_member(archive, info) for info in archive.infolist()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.", hint="Check --inputs.") from error
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, SyntaxError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a sound .npz file ({error}).", hint="Write it with numpy.savez(path, name=array, ...)."
        ) from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """One array. numpy allocates what the header says before it reads: the size is checked against the member first."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename}: .npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        wanted = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or wanted != info.file_size - member.tell():
            raise ValueError(f"{info.filename}: {dtype}{list(shape)} does not fit its {info.file_size} bytes")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
