"""``.onnx_adapter`` files: a flatbuffer of named parameters, through ONNX Runtime's own ``AdapterFormat``.

ONNX Runtime checks the buffer and that each parameter's shape fits its bytes. The format has no scale, no rank and no
order. ``adapter_version`` and ``model_version`` are for loaders to check; ONNX Runtime itself does not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, require

__all__ = ["has_adapter_magic", "read_parameters", "read_versions", "write_parameters"]

_MAGIC = b"TORT"


def has_adapter_magic(path: Path) -> bool:
    """Whether the file begins as these do."""
    with open(path, "rb") as file:
        return file.read(8)[4:] == _MAGIC


def read_parameters(path: Path) -> dict[str, Array]:
    """The parameters by name, in the order of their names.

    Raises:
        InputError: The file is damaged.
        MissingExtraError: ONNX Runtime is not installed.
    """
    file = _opened(path)
    values = file.get_parameters()
    return {name: _array(values[name]) for name in sorted(values)}


def read_versions(path: Path) -> tuple[int, int]:
    """(adapter_version, model_version).

    Raises:
        InputError: The file is damaged.
        MissingExtraError: ONNX Runtime is not installed.
    """
    file = _opened(path)
    return int(file.get_adapter_version()), int(file.get_model_version())


def _opened(path: Path) -> Any:
    runtime: Any = require("onnxruntime", "read .onnx_adapter files")
    try:
        file = runtime.AdapterFormat.read_adapter(str(path))
        file.get_parameters()
    except Exception as error:  # ONNX Runtime throws its own kinds, all of them without a common base
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise InputError(
            f"{path}: ONNX Runtime cannot read it as an .onnx_adapter ({first[-160:]}).", hint="Fetch the file again."
        ) from error
    return file


def _array(value: Any) -> Array:
    """A copy of a parameter in its own dtype; bfloat16 too, which ONNX Runtime's ``numpy()`` refuses."""
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, ir.DataType(value.element_type()).numpy()).reshape(value.shape())


def write_parameters(path: Path, parameters: Mapping[str, Array], *, versions: tuple[int, int] = (1, 1)) -> None:
    """Write parameters; the same ones give the same bytes.

    Args:
        path: The file.
        parameters: By name.
        versions: (adapter_version, model_version).

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime: Any = require("onnxruntime", "write .onnx_adapter files")
    file = runtime.AdapterFormat()
    file.set_adapter_version(versions[0])
    file.set_model_version(versions[1])
    # A parameter's value is the array's own memory, and set_parameters keeps no reference to it (docs/upstream.md).
    alive = {name: np.ascontiguousarray(parameters[name]) for name in sorted(parameters)}
    file.set_parameters({name: _value(runtime, array) for name, array in alive.items()})
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:  # what the runtime says of a file that it cannot write
        full = shutil.disk_usage(path.parent).free < sum(array.nbytes for array in alive.values())
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    del alive


def _value(runtime: Any, dense: Array) -> Any:
    dtype = ir.DataType.from_numpy(dense.dtype)
    if dtype == ir.DataType.BFLOAT16:
        return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(dense.view(np.uint16), int(dtype))
    return runtime.OrtValue.ortvalue_from_numpy(dense)
