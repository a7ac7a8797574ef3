"""What kind of model a path is, by its bytes and never by its suffix.

Only the start of a file is read: magic numbers, a zip's directory, the top-level fields of a protobuf, the header of a
safetensors file. What is known and is no model gets an error that says what it is and where it belongs.
"""

from __future__ import annotations

import os
from pathlib import Path

from loracc.errors import InputError
from loracc.sources.checkpoint_files import STEMS, is_index
from loracc.sources.sniff_adapter import is_adapter_file, is_adapter_folder
from loracc.sources.sniff_bytes import foreign_kind, is_onnx, looks_like_safetensors
from loracc.sources.sniff_zip import sniff_zip

__all__ = ["sniff"]

#: ``torch.save`` before 1.6: pickle protocol 2 of torch's magic number, 0x1950a86a20f9469cfc6c.
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_TAKEN = (
    "loracc takes .onnx, .pt2 (torch.export.save), .pt (TorchScript, pickled module, state dict), a Hugging Face "
    "folder or a .safetensors checkpoint."
)


def sniff(path: str | os.PathLike[str]) -> str:
    """The kind of model: "onnx", "exported_program", "torchscript", "pickle", "huggingface" or "checkpoint".

    Raises:
        InputError: Nothing is there, it cannot be read, it is damaged, or it is no model.
    """
    target = Path(path)
    try:
        if target.is_dir():
            return _sniff_folder(target)
        return _sniff_file(target)
    except OSError as error:
        what = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"{target}: {what}.", hint="Check the model's path.") from error


def _sniff_file(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor a folder.", hint=_TAKEN)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        if not size:
            raise InputError(f"{path}: the file is empty.", hint="Fetch or export the model again.")
        if path.name in ("adapter_model.bin", "adapter_config.json"):
            raise _adapter(path)
        # First of all: its first bytes are a length, and so may be anything, another kind's magic too.
        if looks_like_safetensors(start):
            return _safetensors(path)
        if start.startswith(b"PK"):
            return sniff_zip(path)
        if start.startswith(_TORCH_LEGACY):
            return "pickle"
        if foreign := foreign_kind(start):
            raise InputError(f"{path}: this is {foreign[0]}.", hint=foreign[1] or _TAKEN)
        if is_onnx(path, file, size):
            return "onnx"
    if is_index(path):
        return "checkpoint"
    raise InputError(f"{path}: not a model of a known kind (it begins with {start[:8].hex(' ')}).", hint=_TAKEN)


def _safetensors(path: Path) -> str:
    if is_adapter_file(path):
        raise _adapter(path)
    return "checkpoint"


def _sniff_folder(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise InputError(f"{folder}: the folder is empty.", hint=_TAKEN)
    weights = [name for name in names if _is_weights(name)]
    if is_adapter_folder(names) and not (weights and "config.json" in names):
        raise _adapter(folder)
    if weights and "config.json" in names:
        return "huggingface"
    if weights:
        return "checkpoint"
    raise InputError(*_no_weights(folder, names))


def _is_weights(name: str) -> bool:
    """Whether a file of this name makes its folder a checkpoint."""
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return not name.startswith("adapter_")
    return name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))


def _no_weights(folder: Path, names: list[str]) -> tuple[str]:
    """What a folder without weights is, and what to do about it."""
    graphs = [name for name in names if name.endswith((".onnx", ".pt2"))]
    if "model_index.json" in names:
        problem = (
            "a diffusers pipeline: name the folder of the one model that is meant (unet, transformer, text_encoder)"
        )
    elif any(name.endswith((".h5", ".msgpack", ".ckpt.index")) for name in names):
        problem = "it holds TensorFlow or Flax weights only: save the model as safetensors first"
    elif graphs:
        problem = f"a folder is taken for a Hugging Face one; name the model file itself: {folder / graphs[0]}"
    elif "config.json" in names:
        problem = f"config.json is there and the weights are not ({', '.join(f'{stem}.safetensors' for stem in STEMS)})"
    else:
        problem = f"no weights in this folder (it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    return (f"{folder}: {problem}.",)


def _adapter(path: Path) -> InputError:
    return InputError(
        f"{path}: this is an adapter, and a base model is expected here.",
        hint="Name the base model first and the adapter after it: loracc fold MODEL ADAPTER -o OUT",
    )
