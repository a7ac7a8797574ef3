"""A Hugging Face folder's tensors as torch tensors that stay in their files, and back.

``from_pretrained(None, config=..., state_dict=...)`` is given tensors that are views of the mapped files. transformers
then does what it does for any checkpoint (prefixes, renamings, tied weights, merged experts, real values for buffers
that no checkpoint holds) without a copy, and the address of each parameter's data afterwards tells which tensor of
which file it is. What transformers had to compute (merged experts, a cast) is in memory and stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from loracc.errors import InputError
from loracc.sources.checkpoint_files import read_files
from loracc.sources.safetensors_file import TensorInfo, tensor_of

if TYPE_CHECKING:
    import torch

__all__ = ["MappedWeights", "read_weights"]


class MappedWeights:
    """A checkpoint's tensors for torch, and where each lies.

    Attributes:
        state: Name in the checkpoint -> tensor, mapped.
    """

    def __init__(self, state: dict[str, torch.Tensor], infos: Mapping[str, TensorInfo]) -> None:
        self.state = state
        self._infos = {tensor.data_ptr(): infos[name] for name, tensor in state.items() if name in infos}

    def lazy(self, tensor: torch.Tensor) -> ir.TensorProtocol | None:
        """The tensor of a file that a parameter is, bit for bit; None when it was computed or is no safetensors."""
        info = self._infos.get(tensor.data_ptr())
        if info is None or not tensor.is_contiguous() or tuple(tensor.shape) != info.shape:
            return None
        found = tensor_of(info)
        return found if found.nbytes == tensor.nbytes else None


def read_weights(folder: Path) -> MappedWeights:
    """Map the folder's weights: safetensors, or else ``pytorch_model*.bin`` (read with ``weights_only=True``).

    Raises:
        InputError: No weights, or the files are damaged or disagree.
    """
    from loracc.sources.checkpoint import torch_weight_files

    if torch_weight_files(folder):
        from onnx_ir.tensor_adapters import TorchTensor

        from loracc.sources.torch_checkpoint import read_torch_weights

        _, tensors = read_torch_weights(folder)
        return MappedWeights({str(t.name): t.raw for t in tensors if isinstance(t, TorchTensor)}, {})
    return _map_safetensors(folder)


def _map_safetensors(folder: Path) -> MappedWeights:
    from safetensors import SafetensorError, safe_open

    files = read_files(folder)
    state: dict[str, torch.Tensor] = {}
    for shard in files.shards:
        try:
            with safe_open(shard.path, framework="pt", device="cpu") as file:
                for info in shard.tensors:
                    state[info.name] = file.get_tensor(info.name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{shard.path}: cannot be read ({error}).", hint="The file is damaged: fetch it again."
            ) from error
    return MappedWeights(state, {info.name: info for info in files.tensors})
