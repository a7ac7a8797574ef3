"""``link``: an ``.onnx`` whose unchanged weights stay in the base's own data file, for many variants of one base.

What the readers allow was tried (ONNX Runtime 1.32, onnx 1.22, onnx-ir 1.1): a file in the model's own folder, or below
it, is read by all of them. ``..``, absolute paths and symbolic links that lead out are refused by all; a hard link is
refused by onnx and onnx-ir, not only for the variant but from then on for the base as well. So the output must lie in
the folder of the base's data file, or above it. A safetensors file serves as a data file as well as any other.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import onnx_ir as ir

from loracc.errors import InputError

__all__ = ["check_linked", "check_sources", "location_in"]


def location_in(home: Path, tensor: ir.TensorProtocol) -> str | None:
    """Where an unchanged tensor's file lies, relative to ``home``; None where it is computed or lies elsewhere."""
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    real, folder = Path(os.path.realpath(tensor.path)), Path(os.path.realpath(home))
    return real.relative_to(folder).as_posix() if real.is_relative_to(folder) else None


def check_linked(name: str, home: Path, tensors: Iterable[ir.TensorProtocol], borrowed: Collection[str]) -> None:
    """Refuse a link that would link nothing.

    Raises:
        InputError: No unchanged weight lies in a file of the output's folder.
    """
    if borrowed:
        return
    folders = sorted({str(Path(path).parent) for tensor in tensors for path in files_of(tensor)})
    where = f"the base's weights lie in {folders[0]}" if folders else "the base's weights lie inside its .onnx file"
    raise InputError(
        f"{name}: nothing can be linked from {home}: {where}.",
        hint=f"Write the output into {folders[0]}: runtimes refuse data outside the model's folder."
        if folders
        else "Write the base once with --data data, and link to that.",
    )


def check_sources(tensors: Iterable[ir.TensorProtocol], outputs: Collection[Path]) -> None:
    """Refuse to write a file that the model's own weights are read from.

    Raises:
        InputError: An output is such a file.
    """
    targets = {os.path.realpath(path) for path in outputs}
    for path in dict.fromkeys(path for tensor in tensors for path in files_of(tensor)):
        if os.path.realpath(path) in targets:
            raise InputError(f"{path}: the base's weights are read from this file.", hint="Choose another output.")


def files_of(tensor: ir.TensorProtocol) -> Iterator[str]:
    """The file that a tensor, or what it is computed from, lies in."""
    inner: object = tensor
    while not isinstance(inner, ir.ExternalTensor):
        inner = getattr(inner, "base", None)
        if inner is None:
            return
    yield inner.path
