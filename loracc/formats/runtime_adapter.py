"""``.onnx_adapter`` files for one attached graph, told from those for another by the format's two version numbers.

The format has no room for metadata but two integers, which ONNX Runtime does not look at:

=============== ========================================================================================
model_version   the first 31 bits of the graph's :attr:`loracc.manifest.Manifest.digest`
adapter_version the first 31 bits of a sha256 over the parameters: names, types, shapes and bytes
=============== ========================================================================================

So a file of another base, of other sites or of another export is known by its first number, and a file that was changed
by its second. Both are 1 in files for no particular graph (``loracc convert``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.formats.onnx_adapter_file import read_parameters, read_versions, write_parameters
from loracc.manifest import Manifest

__all__ = ["RuntimeAdapter", "model_version", "parameters_version", "read_runtime_adapter", "write_runtime_adapter"]


@dataclass(frozen=True)
class RuntimeAdapter:
    """A file's contents: parameters by name, and the two numbers."""

    parameters: dict[str, Array]
    adapter_version: int
    model_version: int


def _bits(hexadecimal: str) -> int:
    return int(hexadecimal[:8], 16) >> 1


def model_version(manifest: Manifest) -> int:
    """What adapters for this graph carry."""
    return _bits(manifest.digest)


def parameters_version(parameters: Mapping[str, Array]) -> int:
    """What a file with these parameters carries."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        array = np.ascontiguousarray(parameters[name])
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return _bits(digest.hexdigest())


def write_runtime_adapter(path: Path, parameters: Mapping[str, Array], manifest: Manifest) -> None:
    """Write one adapter of an attached graph.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    write_parameters(path, parameters, versions=(parameters_version(parameters), model_version(manifest)))


def read_runtime_adapter(path: Path) -> RuntimeAdapter:
    """Read a file and check it against its own number.

    Raises:
        InputError: It is damaged, or its parameters are not those it was written with.
        MissingExtraError: ONNX Runtime is not installed.
    """
    parameters = read_parameters(path)
    adapter, model = read_versions(path)
    if model != 1 and adapter != parameters_version(parameters):
        raise InputError(
            f"{path}: its parameters are not those it was written with (adapter_version {adapter}, expected "
            f"{parameters_version(parameters)}).",
            hint="Fetch the file again, or write it again with loracc attach.",
        )
    return RuntimeAdapter(parameters, adapter, model)
