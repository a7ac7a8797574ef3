"""Which files make a checkpoint: one safetensors file, or a folder with shards, their index and what goes with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.errors import InputError
from loracc.json_file import read_json, read_json_object
from loracc.sources.safetensors_file import SafetensorsFile, TensorInfo, read_header

__all__ = [
    "STEMS",
    "WEIGHT_SUFFIXES",
    "CheckpointFiles",
    "is_index",
    "read_config",
    "read_files",
    "read_weight_map",
    "surroundings",
    "weight_file",
]

#: Stems of the weight files that the libraries look for in a folder, in this order.
STEMS = ("model", "diffusion_pytorch_model")
#: Files that hold weights, of whatever framework: never copied beside merged ones.
WEIGHT_SUFFIXES = (
    frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ot"})
    | frozenset({".h5", ".keras", ".msgpack", ".npz", ".npy", ".tflite", ".gguf"})
    | frozenset({".onnx", ".data", ".onnx_data", ".engine"})
)


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on disk.

    Attributes:
        root: The folder, or the file where the checkpoint is one bare file.
        shards: Headers of the weight files, in the order of their names; empty where the weights are PyTorch's
            ``pytorch_model*.bin``.
        index: The ``*.safetensors.index.json`` that names the shards, where there is one.
        others: Files that belong to the model and hold no weights of it (configuration, tokenizer), absolute, sorted.
    """

    root: Path
    shards: tuple[SafetensorsFile, ...]
    index: Path | None = None
    others: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that the files lie in."""
        return self.root if self.root.is_dir() else self.root.parent

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, in file order."""
        return tuple(info for shard in self.shards for info in shard.tensors)


def read_files(path: str | os.PathLike[str]) -> CheckpointFiles:
    """Find and check the files of a safetensors checkpoint: a file, an index, or a folder.

    Raises:
        InputError: No weights, several sets of weights, a missing shard, or an index that disagrees with its shards.
    """
    root = Path(path)
    if root.is_file() and not is_index(root):
        return CheckpointFiles(root, (read_header(root),))
    source = root if root.is_file() else weight_file(root)
    folder = source.parent
    if not is_index(source):
        return CheckpointFiles(root, (read_header(source),), None, surroundings(folder, {source}))
    shards = _read_shards(source)
    return CheckpointFiles(folder, shards, source, surroundings(folder, {source, *(shard.path for shard in shards)}))


def is_index(path: Path) -> bool:
    """Whether a file is the index of a sharded checkpoint, by its name."""
    return path.name.endswith(".index.json")


def weight_file(folder: Path) -> Path:
    """The folder's index or only safetensors file.

    Raises:
        InputError: There is none, or several and no index.
    """
    for stem in STEMS:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{folder}: the folder holds no safetensors weights.")
    raise InputError(
        f"{folder}: {len(found)} safetensors files and no index that says how they belong together: {_some(found)}.",
        hint="Name the one file that is meant, or fetch the missing model.safetensors.index.json.",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; empty where there is none.

    Raises:
        InputError: It is there and is not a JSON object.
    """
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def _read_shards(index: Path) -> tuple[SafetensorsFile, ...]:
    """The headers of an index's shards, checked against it."""
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    problems = [f"shard {name!r} is missing" for name in names if not (index.parent / name).is_file()]
    if problems:
        raise _index_error(index, problems)
    shards = tuple(read_header(index.parent / name) for name in names)
    found: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in found:
                problems.append(f"tensor {info.name!r} lies in both {found[info.name]!r} and {shard.path.name!r}")
            found.setdefault(info.name, str(shard.path.relative_to(index.parent)))
    for tensor, name in weight_map.items():
        if tensor not in found:
            problems.append(f"tensor {tensor!r} is not in {name!r}, nor in another shard")
        elif found[tensor] != os.path.normpath(name):
            problems.append(f"tensor {tensor!r} is in {found[tensor]!r}, and the index says {name!r}")
    if problems:
        raise _index_error(index, problems)
    return shards


def read_weight_map(index: Path) -> dict[str, str]:
    """An index's map of tensor name to shard; every shard stays in the index's folder.

    Raises:
        InputError: It is not such an index, or a shard's name leaves the folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _index_error(index, ["it has no weight_map"])
    if not all(isinstance(name, str) and name and "\0" not in name for name in weight_map.values()):
        raise _index_error(index, ["its weight_map does not map names to files"])
    outside = sorted({name for name in weight_map.values() if not _inside(name)})
    if outside:
        raise _index_error(index, [f"shard {name!r} lies outside the folder" for name in outside])
    return weight_map


def _inside(name: str) -> bool:
    """Whether a relative name stays in its folder, by its text: the links of a hub's cache to its blobs are fine."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _index_error(index: Path, problems: list[str]) -> InputError:
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return InputError(
        f"{index}: the index and its shards do not fit together: {'; '.join(problems[:10])}{more}.",
        hint="The download is incomplete or mixed: fetch the checkpoint again.",
    )


def surroundings(folder: Path, weights: set[Path]) -> tuple[Path, ...]:
    """What goes with the weights: the folder's own files, and the module folders of a sentence-transformers model."""
    found = [path for path in folder.iterdir() if _goes_along(path) and path not in weights]
    for module in _module_folders(folder):
        found += [path for path in module.rglob("*") if path.is_file()]
    return tuple(sorted(found))


def _goes_along(path: Path) -> bool:
    hidden = path.name.startswith(".")
    index = path.name.endswith(".index.json")
    return path.is_file() and not hidden and not index and path.suffix.lower() not in WEIGHT_SUFFIXES


def _module_folders(folder: Path) -> list[Path]:
    """Sub-folders that ``modules.json`` names (pooling, normalisation, dense layers)."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    entries = read_json(path)
    names = (
        [str(entry.get("path", "")) for entry in entries if isinstance(entry, dict)]
        if isinstance(entries, list)
        else []
    )
    return [folder / name for name in names if name and _inside(name) and (folder / name).is_dir()]


def _some(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
