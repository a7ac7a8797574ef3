"""Targets: what a lowered model is written as. The ending of the output's name decides which.

To add one: a module here with ``write(model, path, ...)``, and a line in ``target_for``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loracc.errors import InputError

__all__ = ["Target", "target_for"]


@dataclass(frozen=True)
class Target:
    """One kind of output.

    Attributes:
        name: "onnx", "exported_program" or "checkpoint".
        needs_graph: The model must be traced for it.
        folder: The output is a folder.
    """

    name: str
    needs_graph: bool
    folder: bool = False


#: Endings that name a kind of file which loracc reads or knows, and does not write.
_NOT_WRITTEN = {".pt", ".pth", ".bin", ".gguf", ".engine", ".plan", ".data", ".npz", ".onnx_adapter"}


def target_for(output: str | os.PathLike[str]) -> Target:
    """The target that an output's name asks for.

    Raises:
        InputError: No name, or an ending of which loracc writes no model.

    >>> target_for("out.onnx").name, target_for("merged").folder
    ('onnx', True)
    """
    path = Path(output)
    if not str(output) or not path.name:
        raise InputError("no output was named.", hint="Name one with -o OUT.")
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return Target("onnx", needs_graph=True)
    if suffix == ".pt2":
        return Target("exported_program", needs_graph=True)
    if suffix == ".safetensors":
        return Target("checkpoint", needs_graph=False)
    if suffix in _NOT_WRITTEN:
        raise InputError(
            f"{output}: fold writes no {suffix} files.",
            hint="OUT ends in .onnx, .pt2 or .safetensors; any other name is a folder for a merged checkpoint.",
        )
    return Target("checkpoint", needs_graph=False, folder=True)
