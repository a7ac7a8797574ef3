"""One bare layer under one PEFT tuner: PEFT's own forward, and the weights that loracc makes of the saved tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from loracc.dtypes import Array
from loracc.kinds.peft_table import PEFT_KINDS
from loracc.kinds.spec import KindSpec

Tensor = torch.Tensor


class Bare(nn.Module):
    """A model of one layer; PEFT wants a parent."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.config = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def bare_layer(kind: str) -> nn.Module:
    """A layer of each sort, with biases where it can have one and no two dimensions alike."""
    from transformers.pytorch_utils import Conv1D

    conv1d_hf: Any = Conv1D
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(16, 24),
        "linear_tall": lambda: nn.Linear(24, 16),
        "linear_square": lambda: nn.Linear(16, 16, bias=False),
        "conv1d_hf": lambda: conv1d_hf(24, 16),
        "conv1d": lambda: nn.Conv1d(16, 24, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(16, 24, 3, padding=1),
        "conv2d_1x1": lambda: nn.Conv2d(16, 24, 1),
        "conv2d_groups": lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2),
        "conv3d": lambda: nn.Conv3d(4, 8, 3, padding=1),
        "embedding": lambda: nn.Embedding(20, 16),
        "layernorm": lambda: nn.LayerNorm(16),
    }
    torch.manual_seed(1)
    layer: nn.Module = made[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def sample(kind: str) -> Tensor:
    """An input for that layer, float64 (ids for an embedding)."""
    torch.manual_seed(2)
    shapes = {"conv1d": (2, 16, 7), "conv3d": (2, 4, 5, 5, 5), "linear_tall": (5, 24)}
    if kind == "embedding":
        return torch.arange(20)[None]
    shape = shapes.get(kind, (2, 16, 6, 6) if kind.startswith("conv2d") else (5, 16))
    return torch.randn(*shape, dtype=torch.float64)


@dataclass
class Wrapped:
    """A layer under PEFT, with random parameters, and what it saves."""

    base: nn.Module
    model: Any
    tensors: dict[str, Tensor]
    config: dict[str, object]


def wrap(layer: nn.Module, config: Any, *, double: bool = True) -> Wrapped:
    """PEFT around ``layer``, every adapter parameter random (PEFT starts many at zero), float64 unless told."""
    from peft import get_peft_model, get_peft_model_state_dict

    torch.manual_seed(3)
    base = copy.deepcopy(layer)
    model: Any = get_peft_model(Bare(copy.deepcopy(layer)), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "base_layer" not in name and parameter.dtype.is_floating_point:
            nn.init.normal_(parameter, mean=0.1, std=0.3)
    if double:
        model.double()
    base.double()
    model.eval()
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    saved = {key: value.value if hasattr(value, "value") else value for key, value in config.to_dict().items()}
    return Wrapped(base, model, tensors, saved)


def by_role(tensors: Mapping[str, Tensor], spec: KindSpec) -> dict[str, Array]:
    """The saved tensors of the one module, and the shared ones, by role; every key must be known to the table."""
    arrays: dict[str, Array] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.").removeprefix("model.")
        role = spec.shared_role(name) or spec.roles.get(name.removeprefix("layer."))
        assert role, f"{key} is in no table: roles {dict(spec.roles)}, shared {dict(spec.shared)}"
        arrays[role] = tensor.numpy()
    return arrays


def canonical(layer: nn.Module, weight: Tensor) -> Array:
    """The stored weight in PyTorch's orientation."""
    from transformers.pytorch_utils import Conv1D

    return (weight.T if isinstance(layer, Conv1D) else weight).detach().numpy()


def loracc_layer(wrapped: Wrapped) -> nn.Module:
    """The bare layer with the weights that loracc's kinds make."""
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    changes = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")
    layer = copy.deepcopy(wrapped.base)
    for parameter, delta in changes.items():
        stored = getattr(layer, parameter, None)
        if stored is None:
            assert parameter in spec.optional, f"the layer has no {parameter}"
            continue
        old = canonical(layer, stored)
        new = check_tilings(delta.resolve(old.shape), old)
        stored.data = torch.from_numpy(canonical(layer, torch.from_numpy(new)).copy())
    return layer


def check_tilings(delta: Any, weight: Array) -> Array:
    """W', after checking that every way to tile the weight gives the same."""
    assert len(delta.shape) == weight.ndim
    assert all(n is None or n == m for n, m in zip(delta.shape, weight.shape, strict=True)), delta.shape
    new: Array = delta.apply(weight)
    for axis in range(min(weight.ndim, 2)):
        length = weight.shape[axis]

        def read(lo: int, hi: int, axis: int = axis) -> Array:
            return np.take(weight, range(lo, hi), axis=axis)

        statistic = delta.prepare(read, axis, length, 5)
        slabs = [
            delta.apply_slab(read(lo, min(lo + 5, length)), axis, lo, min(lo + 5, length), statistic)
            for lo in range(0, length, 5)
        ]
        np.testing.assert_allclose(np.concatenate(slabs, axis=axis), new, rtol=1e-12, atol=1e-13)
    return new


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got − expected| over max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max())


def compare(wrapped: Wrapped, kind: str) -> tuple[float, float]:
    """(error of loracc's forward against PEFT's, how much the adapter changes the output at all)."""
    x = sample(kind)
    with torch.no_grad():
        expected = wrapped.model(x)
        got = loracc_layer(wrapped)(x)
        before = wrapped.base(x)
    return relative_error(got, expected), relative_error(before, expected)
