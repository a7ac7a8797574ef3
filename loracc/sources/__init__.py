"""Model front ends: whatever comes in becomes a :class:`loracc.model.BaseModel`.

A kind of file is told by its bytes (:mod:`loracc.sources.sniff`); the front end of a kind is imported when one comes.
To add one: a kind in ``sniff``, a line in ``FRONT_ENDS``, a module with ``load_x(path, options) -> BaseModel``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from loracc.errors import InputError
from loracc.model import BaseModel, LoadOptions
from loracc.sources.sniff import sniff

__all__ = ["FRONT_ENDS", "load_model", "sniff"]

#: (kind, "module:function"), in the order in which messages list them.
FRONT_ENDS: tuple[tuple[str, str], ...] = (
    ("onnx", "loracc.sources.onnx_model:load_onnx"),
    ("exported_program", "loracc.sources.exported_program:load_exported_program"),
    ("torchscript", "loracc.sources.torchscript:load_torchscript"),
    ("pickle", "loracc.sources.pickled:load_pickled"),
    ("huggingface", "loracc.sources.huggingface:load_huggingface"),
    ("checkpoint", "loracc.sources.checkpoint:load_checkpoint"),
)


def load_model(path: str | os.PathLike[str], options: LoadOptions | None = None) -> BaseModel:
    """Read a base model of any kind. Its weights stay in their files.

    Args:
        path: ``.onnx``, ``.pt2``, ``.pt``, a Hugging Face folder, a safetensors checkpoint.
        options: What the front end may need to be told. With ``graph=False`` a Hugging Face folder is read as a bare
            checkpoint: nothing is traced and torch is not needed.

    Raises:
        InputError: The path is missing, of no known kind, damaged or unsafe.
        UnsupportedError: It is understood and refused.
        MissingExtraError: Its kind needs a package that is not installed.
    """
    options = options or LoadOptions()
    kind = sniff(path)
    if kind == "huggingface" and not options.graph:
        kind = "checkpoint"
    told = f"--task {options.task}" if options.task else f"--part {options.part}" if options.part else ""
    if told and kind not in ("huggingface", "onnx"):  # an .onnx file says so in its own words
        raise InputError(
            f"{path}: {told} says what a Hugging Face folder is exported for; here "
            + ("only its weights are read." if sniff(path) == "huggingface" else f"is a {kind.replace('_', ' ')}."),
            hint="Leave it out." if options.graph else "Leave it out, or write a graph: -o OUT.onnx or OUT.pt2.",
        )
    return _front_end(kind)(Path(path), options)


def _front_end(kind: str) -> Callable[[Path, LoadOptions], BaseModel]:
    module, _, function = dict(FRONT_ENDS)[kind].partition(":")
    load: Callable[[Path, LoadOptions], BaseModel] = getattr(importlib.import_module(module), function)
    return load
