"""What the format tests share: a module with an adapter of its training library, folded by loracc and compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loracc

__all__ = ["TinyBlock", "folded_state", "folded_with", "relative_error", "save_base"]


class TinyBlock(nn.Module):
    """A linear layer, a square one, two convolutions, a normalisation; underscores in the names on purpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1)])
        self.mid = nn.ModuleDict({"to_q": nn.Linear(6, 10), "proj_out": nn.Linear(10, 10), "norm": nn.LayerNorm(10)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` is ``[batch, 4, h, w]``; returns ``[batch, h·w, 10]``."""
        for layer in self.down_blocks:
            x = layer(x)
        tokens = x.flatten(2).transpose(1, 2)
        result: torch.Tensor = self.mid["norm"](self.mid["proj_out"](torch.tanh(self.mid["to_q"](tokens))))
        return result


def save_base(module: nn.Module, folder: Path) -> Path:
    """The module's weights as a bare checkpoint."""
    path = folder / "base.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}, path)
    return path


def folded_state(base: Path, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The checkpoint with the adapter folded in, verified by loracc itself."""
    out = base.parent / "folded.safetensors"
    loracc.fold(base, [adapter], out, force=True, **options)
    return load_file(out)


def folded_with(module: nn.Module, adapter: Path, folder: Path, **options: Any) -> nn.Module:
    """A copy of the plain module with the folded weights."""
    result = copy.deepcopy(module)
    result.load_state_dict(folded_state(save_base(module, folder), adapter, **options))
    return result.eval()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |got − expected| / max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max())
