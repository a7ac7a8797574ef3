"""PyTorch's ``pytorch_model*.bin`` folders as checkpoints: tensors only, mapped, nothing unpickled that could run."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError, require
from loracc.quiet import quiet
from loracc.sources.checkpoint_files import CheckpointFiles, read_weight_map, surroundings
from loracc.sources.torch_tensors import check_stored, plain_tensors

__all__ = ["read_state_dict", "read_torch_weights"]


def read_torch_weights(folder: Path) -> tuple[CheckpointFiles, list[ir.TensorProtocol]]:
    """The tensors of a folder's ``pytorch_model.bin`` or of the shards that its index names, in file order.

    ``torch.load(weights_only=True)`` builds tensors and plain containers and refuses everything else, so no
    ``--allow-pickle`` is needed.

    Raises:
        InputError: A shard is missing or damaged, holds anything but tensors, or two hold one name.
        MissingExtraError: torch is not installed.
    """
    index = folder / "pytorch_model.bin.index.json"
    names = sorted(set(read_weight_map(index).values())) if index.is_file() else ["pytorch_model.bin"]
    tensors: dict[str, ir.TensorProtocol] = {}
    for name in names:
        for key, tensor in read_state_dict(folder / name).items():
            if key in tensors:
                raise InputError(f"{folder / name}: tensor {key!r} is in another shard too.", hint="Fetch it again.")
            tensors[key] = tensor
    files = CheckpointFiles(folder, (), None, surroundings(folder, set()))
    return files, list(tensors.values())


def read_state_dict(path: Path) -> dict[str, ir.TensorProtocol]:
    """The tensors of one ``.bin`` file; they stay in it where the file's format allows (any since torch 1.6)."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.", hint="The checkpoint is incomplete: fetch it again.")
    require("torch", "read pytorch_model.bin files")
    state = _load(path)
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors.")
    tensors = {key: value for key, value in state.items() if hasattr(value, "untyped_storage")}
    if len(tensors) != len(state):
        odd = next(key for key in state if key not in tensors)
        raise InputError(
            f"{path}: {odd!r} is a {type(state[odd]).__name__}, expected only tensors.",
            hint="A training checkpoint holds more than the weights: save model.state_dict() on its own, or convert it "
            "to safetensors.",
        )
    return plain_tensors(path, {str(key): value for key, value in tensors.items()})


def _load(path: Path) -> Any:
    import torch

    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            check_stored(path)
        with quiet("torch"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except Exception as error:  # torch's reader has no error class of its own for damaged files
        if isinstance(error, UnpicklingError) and (found := re.search(r"Unsupported \S+ (GLOBAL )?\S+", str(error))):
            raise InputError(
                f"{path}: holds more than tensors, and reading that runs code of the file's author ({found[0]}).",
                hint="If you trust it, load it where it was made and save the tensors as safetensors.",
            ) from error
        raise InputError(
            f"{path}: torch cannot read it as weights ({_first_line(error)}).",
            hint="It is damaged or holds more than tensors: convert the checkpoint to safetensors where it loads.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
