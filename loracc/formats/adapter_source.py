"""Where an adapter lies: the file of its tensors and the configuration beside it, if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.formats.tensors import read_tensors, some
from loracc.json_file import read_json_object

__all__ = ["CONFIG", "WEIGHTS", "AdapterSource", "locate", "open_source"]

CONFIG = "adapter_config.json"
#: File names that libraries give an adapter's tensors, in the order they are looked for.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors")
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx_adapter"})


@dataclass(frozen=True)
class AdapterSource:
    """What every format reader is given.

    Attributes:
        path: What the user named.
        file: The file with the tensors.
        tensors: All of them, in the file's order.
        metadata: The file's metadata strings.
        config: The ``adapter_config.json`` beside it; None where there is none.
    """

    path: Path
    file: Path
    tensors: dict[str, Array]
    metadata: dict[str, str]
    config: dict[str, Any] | None


def open_source(path: Path, *, allow_pickle: bool = False) -> AdapterSource:
    """Find the files and read them.

    Raises:
        InputError: Nothing is there, several adapters are, or a file is damaged.
    """
    file, config_file = locate(path)
    config = read_json_object(config_file) if config_file else None
    tensors, metadata = read_tensors(file, allow_pickle=allow_pickle)
    return AdapterSource(path, file, tensors, metadata, config)


def locate(path: Path) -> tuple[Path, Path | None]:
    """(tensor file, configuration or None) of what the user named.

    A folder is searched for the names in ``WEIGHTS``; then for folders of named adapters inside it (PEFT writes
    ``<dir>/<adapter_name>/`` for any name but "default"); then for the only tensor file in it.
    """
    try:
        if path.name == CONFIG and path.is_file():
            path = path.parent
        if path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return path, _config_of(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    raise InputError(f"{path}: no such file or folder.", hint="Check the adapter's path.")


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    config = folder / CONFIG
    found = config if config.is_file() else None
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name, found
    named = sorted(child for child in folder.iterdir() if _is_named_adapter(child))
    if len(named) == 1:
        return _in_folder(named[0])
    if named:
        raise InputError(
            f"{folder}: holds {len(named)} adapters: {some(child.name for child in named)}.",
            hint=f"Name the one that is meant: {named[0]}",
        )
    files = sorted(child for child in folder.iterdir() if child.suffix in _SUFFIXES and child.is_file())
    if len(files) == 1:
        return files[0], found
    if found and not files:
        raise InputError(f"{folder}: {CONFIG} is there, and the tensors ({WEIGHTS[0]}) are not.", hint="Fetch them.")
    what = f"{len(files)} files that could be one: {some(file.name for file in files)}" if files else "no adapter"
    raise InputError(f"{folder}: holds {what}.", hint=f"An adapter folder holds {WEIGHTS[0]} and {CONFIG}.")


def _is_named_adapter(child: Path) -> bool:
    return child.is_dir() and (child / CONFIG).is_file() and any((child / name).is_file() for name in WEIGHTS)


def _config_of(file: Path) -> Path | None:
    """The configuration beside a file, when the folder is that file's: by its name, or because it is the only one."""
    config = file.parent / CONFIG
    if not config.is_file():
        return None
    others = [child for child in file.parent.iterdir() if child.suffix in _SUFFIXES and child != file]
    return config if file.name in WEIGHTS or not others else None
