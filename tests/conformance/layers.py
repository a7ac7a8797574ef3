"""One small module per kind of layer that PEFT adapts, all in float64 so that nothing hides in the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["LAYERS", "Model", "targets", "token_model"]


class Model(nn.Module):
    """A layer between two fixed ones, as PEFT needs a parent to replace it in."""

    def __init__(self, layer: nn.Module, inputs: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        y = y.flatten(1)[:, :4]
        return self.head(self.norm(y))


class Tokens(nn.Module):
    """An embedding whose name no ``base_layer`` ends with: PEFT looks for token rows by the end of a name."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x)


class Attention(nn.Module):
    """Self-attention by ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Gated experts as transformers stacks them: ``[E, in, out]`` with ``is_transposed``, else ``[E, out, in]``."""

    def __init__(self, *, is_transposed: bool, hidden: int = 5, inner: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (hidden, 2 * inner), (inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, *(up if is_transposed else up[::-1])))
        self.down_proj = nn.Parameter(torch.randn(experts, *(down if is_transposed else down[::-1])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        equation = "bi,eio->ebo" if self.is_transposed else "bi,eoi->ebo"
        gate, up = torch.einsum(equation, x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum(equation.replace("bi", "ebi"), gate.tanh() * up, self.down_proj).sum(0)


def _noise(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


#: name -> (module, inputs)
LAYERS: dict[str, Callable[[], Model]] = {
    "linear": lambda: Model(nn.Linear(5, 7), _noise(3, 5)),
    "linear square": lambda: Model(nn.Linear(6, 6), _noise(3, 6)),
    "linear no bias": lambda: Model(nn.Linear(5, 7, bias=False), _noise(3, 5)),
    "Conv1D": lambda: Model(Conv1D(7, 5), _noise(3, 5)),  # type: ignore[no-untyped-call]  # untyped upstream
    "Conv1D square": lambda: Model(Conv1D(6, 6), _noise(3, 6)),  # type: ignore[no-untyped-call]
    "embedding": lambda: Model(nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 2))),
    "conv1d": lambda: Model(nn.Conv1d(3, 4, 3, padding=1, stride=2), _noise(2, 3, 9)),
    "conv2d": lambda: Model(nn.Conv2d(3, 4, (3, 2)), _noise(2, 3, 5, 6)),
    "conv2d 1x1": lambda: Model(nn.Conv2d(3, 4, 1, bias=False), _noise(2, 3, 4, 4)),
    "conv3d": lambda: Model(nn.Conv3d(2, 4, 2), _noise(2, 2, 4, 4, 3)),
    "attention": lambda: Model(Attention(), _noise(2, 5, 8)),
    "experts in-out": lambda: Model(Experts(is_transposed=True), _noise(3, 5)),
    "experts out-in": lambda: Model(Experts(is_transposed=False), _noise(3, 5)),
    "experts square": lambda: Model(Experts(is_transposed=True, hidden=6, inner=6), _noise(3, 6)),
}


def token_model() -> Model:
    """For ``trainable_token_indices``."""
    return Model(Tokens(), lambda: torch.randint(0, 11, (3, 2)))


def targets(name: str) -> dict[str, Any]:
    """What PEFT's configuration has to say for the adapter to land on the layer."""
    if name == "attention":
        return {"target_modules": ["attn"]}
    if name.startswith("experts"):
        return {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]}
    return {"target_modules": ["layer"], "fan_in_fan_out": name.startswith("Conv1D")}
