"""The tensors of a PyTorch file as tensors of the IR: plain ones, with their data; the others are refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from loracc.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["check_stored", "plain_tensors"]


def plain_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, ir.TensorProtocol]:
    """``state`` by name, each where it is.

    Raises:
        InputError: A tensor has no data: it was saved from the meta device.
        UnsupportedError: A tensor is sparse, quantized, or of a dtype that no model file holds.
    """
    from onnx_ir.tensor_adapters import TorchTensor

    made: dict[str, ir.TensorProtocol] = {}
    for name, tensor in state.items():
        _refuse(path, name, tensor)
        try:
            made[name] = TorchTensor(tensor.detach(), name=name)
        except TypeError as error:
            raise UnsupportedError(f"{path}: tensor {name!r} is {tensor.dtype}, which loracc does not read.") from error
    return made


def _refuse(path: Path, name: str, tensor: torch.Tensor) -> None:
    import torch

    if tensor.layout != torch.strided:
        raise UnsupportedError(
            f"{path}: tensor {name!r} is sparse ({tensor.layout}); loracc reads dense tensors only.",
            hint="Save tensor.to_dense().",
        )
    if tensor.is_quantized:
        raise UnsupportedError(
            f"{path}: tensor {name!r} is quantized ({tensor.dtype}).", hint="Save tensor.dequantize()."
        )
    if tensor.is_meta:
        raise InputError(
            f"{path}: tensor {name!r} has no data: it was on the meta device when it was saved.",
            hint="Load the weights before saving (offloaded ones too), and save again.",
        )


def check_stored(path: Path) -> None:
    """torch stores what it saves as it is. A compressed archive is not torch's, and may be far larger than it looks.

    Raises:
        InputError: A member is compressed. What is wrong with the archive itself torch says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError, OSError):
        return
    if packed:
        raise InputError(
            f"{path}: {packed[0]} in it is compressed, and torch.save writes no compressed archives.",
            hint="Save it again with torch.save, or as safetensors.",
        )
