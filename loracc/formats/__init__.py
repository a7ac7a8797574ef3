"""Adapter files: whatever comes in becomes an :class:`loracc.adapter.Adapter`.

A format is told by what is in the file, never by its name. To add one: a module with ``is_x(source)`` and
``read_x(source, name, options)``, and a line in ``FORMATS``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter
from loracc.errors import InputError, LoraccError
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import CONFIG, WEIGHTS, AdapterSource, open_source
from loracc.formats.adapter_spec import AdapterSpec, parse_adapter_spec
from loracc.formats.gguf_file import has_gguf_magic
from loracc.formats.onnx_adapter_file import has_adapter_magic
from loracc.formats.tensors import some

__all__ = [
    "FORMATS",
    "AdapterFormat",
    "AdapterOptions",
    "AdapterSpec",
    "is_adapter",
    "load_adapter",
    "parse_adapter_spec",
]


@dataclass(frozen=True)
class AdapterFormat:
    """One line of the registry.

    Attributes:
        name: What the adapter says it is.
        module: Where ``matches`` and ``read`` are, in this package; loaded when the format is asked for.
        matches: Name of the function that looks at a source.
        read: Name of the function that reads it.
        configured: Whether such a file may have an ``adapter_config.json`` beside it.
    """

    name: str
    module: str
    matches: str
    read: str
    configured: bool = True

    def has(self, source: AdapterSource) -> bool:
        """Whether the source is of this format."""
        if source.config is not None and not self.configured:
            return False
        return bool(self._function(self.matches)(source))

    def adapter(self, source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
        """The source, read."""
        adapter: Adapter = self._function(self.read)(source, name, options)
        return adapter

    def _function(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{self.module}"), name)
        return function


#: Tried in this order; the first whose content matches reads the file.
FORMATS: tuple[AdapterFormat, ...] = (
    AdapterFormat("onnx_adapter", "onnx_adapter", "is_onnx_adapter", "read_onnx_adapter"),
    AdapterFormat("gguf", "gguf", "is_gguf", "read_gguf_adapter"),
    AdapterFormat("mlx", "mlx", "is_mlx", "read_mlx"),
    AdapterFormat("kohya", "kohya", "is_kohya", "read_kohya", configured=False),
    AdapterFormat("lycoris", "lycoris", "is_lycoris", "read_lycoris", configured=False),
    AdapterFormat("diffusers", "diffusers", "is_diffusers", "read_diffusers", configured=False),
    AdapterFormat("torchtune", "torchtune", "is_torchtune", "read_torchtune", configured=False),
    AdapterFormat("peft", "unsloth", "is_packed_peft", "read_packed_peft"),
    AdapterFormat("peft", "peft", "is_peft", "read_peft"),
    AdapterFormat("loralib", "loralib", "is_loralib", "read_loralib"),
)


def load_adapter(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Adapter:
    """Read an adapter of any format.

    Args:
        path: A file or a folder.
        name: What to call it; its file's or folder's name when None.
        alpha: ``lora_alpha`` of a file that does not say its own.
        scale: The whole factor on B·A of such a file, in place of alpha/r.
        allow_pickle: A PyTorch file may hold more than tensors; loading it runs code.
        options: Further fields of :class:`AdapterOptions`.

    Raises:
        InputError: Missing, damaged, of no known format, or incomplete.
        UnsupportedError: Understood and refused, with the reason.
        NumericsError: A tensor holds inf or NaN.
    """
    told = AdapterOptions(alpha=alpha, scale=scale, allow_pickle=allow_pickle, **options)
    source = open_source(Path(path), allow_pickle=allow_pickle)
    for candidate in FORMATS:
        if candidate.has(source):
            return candidate.adapter(source, name or _default_name(source), told)
    known = ", ".join(dict.fromkeys(one.name for one in FORMATS))
    raise InputError(
        f"{source.file}: not an adapter of a known format ({known}); it holds {len(source.tensors)} tensors: "
        f"{some(source.tensors, limit=3)}.",
        hint="Is it the model? The model comes first: loracc fold MODEL ADAPTER -o OUT",
    )


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an adapter rather than a model, told without reading a tensor."""
    from loracc.sources.safetensors_file import read_header
    from loracc.sources.sniff_adapter import are_adapter_names, is_adapter_file, is_adapter_folder
    from loracc.sources.torch_checkpoint import read_state_dict

    target = Path(path)
    if target.is_dir():
        names = [child.name for child in target.iterdir()]
        named = any((child / CONFIG).is_file() for child in target.iterdir() if child.is_dir())
        return is_adapter_folder(names) or bool(set(WEIGHTS) & set(names)) or (named and "config.json" not in names)
    if target.name in (CONFIG, *WEIGHTS):
        return True
    if target.is_file() and (has_adapter_magic(target) or has_gguf_magic(target)):
        return True
    if target.suffix in (".pt", ".pth", ".bin") and target.is_file():
        try:
            return are_adapter_names(read_state_dict(target).keys())
        except LoraccError:
            return False  # whatever it is, it is no dictionary of tensors: the model's readers say what is wrong
    if target.suffix != ".safetensors" or not target.is_file():
        return False
    return bool(read_header(target).tensors) and is_adapter_file(target)


def _default_name(source: AdapterSource) -> str:
    """The folder's name for a library's own file names, else the file's."""
    if source.path.is_dir():
        return source.path.resolve().name
    return source.file.resolve().parent.name if source.file.name in WEIGHTS else source.file.stem
