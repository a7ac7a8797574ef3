"""GPT-2 with random weights, and what LoRA's paper compares it with (Hu et al. 2021, table 1 and appendix B).

Base, LoRA kept apart (rank 4 on query and value), AdapterL (Lin et al. 2020: a bottleneck after the MLP) and AdapterH
(Houlsby et al. 2019: one after the attention and one after the MLP). The folded model is made by loracc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PAPER", "TINY", "VARIANTS", "Setting", "Size", "gpt2", "lora_factors"]

VARIANTS = ("base", "unfolded", "AdapterL", "AdapterH")
RANK, ALPHA = 4, 32


@dataclass(frozen=True)
class Size:
    """Of the model."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int


@dataclass(frozen=True)
class Setting:
    """One column of the paper's table: batch, sequence, and how many parameters an adapter has."""

    batch: int
    sequence: int
    parameters: float

    def bottleneck(self, size: Size, per_layer: int) -> int:
        """Width of a bottleneck, with so many of them in a layer."""
        return max(1, round(self.parameters / (2 * size.width * size.layers * per_layer)))


#: GPT-2 medium, and the three settings of table 1.
PAPER = Size(24, 1024, 16, 50257, 1024), (Setting(32, 512, 0.5e6), Setting(16, 256, 11e6), Setting(1, 128, 11e6))
#: The same code in seconds on a CPU.
TINY = Size(2, 64, 4, 256, 64), (Setting(2, 16, 2e4),)


class Bottleneck(nn.Module):
    """x + up(gelu(down(norm(x))))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(self.norm(x))))


class LoraLinear(nn.Linear):
    """y = Wx + b + s·B(Ax), kept apart."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.lora_A, self.lora_B = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * (ALPHA / RANK)


class Block(nn.Module):
    def __init__(self, size: Size, variant: str, setting: Setting) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        adapted = LoraLinear if variant == "unfolded" else lambda width: nn.Linear(width, width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = adapted(width), nn.Linear(width, width), adapted(width)
        self.o, self.fc, self.proj = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        many = {"AdapterL": 1, "AdapterH": 2}.get(variant, 0)
        inner = setting.bottleneck(size, many) if many else 0
        self.after_attention = Bottleneck(width, inner) if many == 2 else nn.Identity()
        self.after_mlp = Bottleneck(width, inner) if many else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.after_attention(self.o(attended))
        return x + self.after_mlp(self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))


class Gpt2(nn.Module):
    def __init__(self, size: Size, variant: str, setting: Setting) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.positions, size.width)
        self.h = nn.ModuleList(Block(size, variant, setting) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def gpt2(size: Size, variant: str, setting: Setting, device: str) -> nn.Module:
    """A variant with weights drawn on the device; those that two variants share are the same.

    Args:
        variant: One of :data:`VARIANTS`.
    """
    with torch.device(device):
        model = Gpt2(size, variant, setting).eval().requires_grad_(False)
    for index, (name, weight) in enumerate(sorted(model.named_parameters())):
        del index
        generator = torch.Generator(device).manual_seed(sum(name.encode()) * 1000 + len(name))
        noise = torch.randn(weight.shape, generator=generator, device=device)
        weight.copy_(1 + 0.1 * noise if weight.ndim == 1 and "ln" in name and name.endswith("weight") else 0.02 * noise)
    return model


def lora_factors(model: nn.Module) -> dict[str, Tensor]:
    """The factors of the "unfolded" variant under PEFT's names."""
    return {
        f"base_model.model.{name}": weight.detach().cpu().contiguous()
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
