"""The options of the Python API's functions sorted by who reads them, and the models that they name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError

if TYPE_CHECKING:
    from loracc.model import BaseModel

__all__ = ["load", "load_traced", "split_options"]

Path_ = str | Path


def load(path: Path_, options: dict[str, Any], *, graph: bool) -> BaseModel:
    """A model; with ``graph`` it must have its computation.

    Raises:
        LoraccError: It cannot be read, or has weights only.
    """
    from loracc.model import LoadOptions
    from loracc.sources import load_model

    loaded = load_model(path, LoadOptions(**{**options, "graph": graph}))
    if graph and not loaded.traced:
        state_dict = loaded.format == "state_dict"
        raise InputError(
            f"{path}: only weights ({loaded.format}), and the output needs the computation too.",
            hint="Say what builds its module: --factory package.module:function."
            if state_dict
            else "Give the model's folder with its config.json, or write a checkpoint: -o OUT.safetensors.",
        )
    return loaded


def load_traced(path: Path_, options: dict[str, Any]) -> BaseModel:
    """A model with its graph.

    Raises:
        InputError: It has weights only.
    """
    return load(path, options, graph=True)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the model's reader, options of the adapters' reader); some are both's."""
    from loracc.formats import AdapterOptions
    from loracc.model import LoadOptions

    read, told = ({f.name for f in fields(cls)} for cls in (LoadOptions, AdapterOptions))
    if unknown := options.keys() - read - told:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    return {k: v for k, v in options.items() if k in read}, {k: v for k, v in options.items() if k in told}
