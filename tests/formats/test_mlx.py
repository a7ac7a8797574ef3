"""Adapters of mlx-lm's own layers (MLX runs on a CPU too), folded and compared with their forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from torch import nn

from loracc.errors import InputError, LoraccError
from loracc.formats import load_adapter
from tests.formats.folding import folded_state, relative_error, save_base

SCALE = 5.0


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(6, 10)
        self.o_proj = nn.Linear(10, 10)
        self.embed_tokens = nn.Embedding(20, 6)


def save(tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any] | None) -> Path:
    folder = tmp_path / "mlx_adapter"
    folder.mkdir(exist_ok=True)
    save_numpy({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def config(kind: str = "lora", scale: float = SCALE) -> dict[str, Any]:
    return {"fine_tune_type": kind, "num_layers": 4, "lora_parameters": {"rank": 2, "scale": scale, "dropout": 0.0}}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_folded_as_mlx_lm_computes_it(tmp_path: Path, kind: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX has no build for this machine")
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    mx_nn: Any = pytest.importorskip("mlx.nn")
    base = Base()
    rng = np.random.default_rng(1)
    tensors, layers = {}, {}
    module: Any
    for name, module in base.named_children():
        weight = mx.array(module.weight.detach().numpy())
        kinds = {"lora": (lora.LoRALinear, lora.LoRAEmbedding), "dora": (dora.DoRALinear, dora.DoRAEmbedding)}[kind]
        if isinstance(module, nn.Linear):
            plain = mx_nn.Linear(module.in_features, module.out_features)
            plain.weight, plain.bias = weight, mx.array(module.bias.detach().numpy())
            layer = kinds[0].from_base(plain, r=2, scale=SCALE)
        else:
            plain = mx_nn.Embedding(*module.weight.shape)
            plain.weight = weight
            layer = kinds[1].from_base(plain, r=2, scale=SCALE)
        layer.lora_a = mx.array(rng.standard_normal(layer.lora_a.shape).astype(np.float32))
        layer.lora_b = mx.array(rng.standard_normal(layer.lora_b.shape).astype(np.float32))
        if kind == "dora":
            layer.m = mx.array(rng.uniform(0.5, 1.5, layer.m.shape).astype(np.float32))
            tensors[f"{name}.m"] = np.array(layer.m)
        tensors |= {f"{name}.lora_a": np.array(layer.lora_a), f"{name}.lora_b": np.array(layer.lora_b)}
        layers[name] = layer
    path = save(tmp_path, tensors, config(kind))
    assert load_adapter(path).format == "mlx"
    after = Base()
    after.load_state_dict(folded_state(save_base(base, tmp_path), path))
    ids = np.arange(20)
    for name, layer in layers.items():
        module = getattr(after, name)
        linear = isinstance(module, nn.Linear)
        x = rng.standard_normal((4, module.in_features)).astype(np.float32) if linear else ids
        expected = torch.from_numpy(np.array(layer(mx.array(x))))
        with torch.no_grad():
            assert relative_error(getattr(base, name)(torch.from_numpy(x)), expected) > 1e-2
            assert relative_error(module(torch.from_numpy(x)), expected) < 3e-6, name


def test_stacked_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 2, 6)), rng.standard_normal((3, 8, 2))
    path = save(tmp_path, {"experts.lora_a": a, "experts.lora_b": b}, config())
    base = nn.Module()
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.randn(3, 8, 6, dtype=torch.float64))
    base.add_module("experts", experts)
    after = folded_state(save_base(base, tmp_path), path)["experts.weight"]
    # LoRASwitchLinear.fuse: weight + (scale * lora_b) @ lora_a
    torch.testing.assert_close(after, experts.weight.detach() + torch.from_numpy(SCALE * b @ a))


def test_fully_tuned_parameters_replace_the_bases(tmp_path: Path) -> None:
    new = np.ones((10, 6), np.float32)
    path = save(tmp_path, {"q_proj.weight": new}, {"fine_tune_type": "full", "num_layers": 4})
    after = folded_state(save_base(Base(), tmp_path), path)
    assert torch.equal(after["q_proj.weight"], torch.ones(10, 6))


def test_without_its_configuration_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, {"q_proj.lora_a": np.ones((6, 2)), "q_proj.lora_b": np.ones((2, 10))}, None)
    with pytest.raises(InputError, match="--scale"):
        load_adapter(path)
    assert [entry.delta.scale for entry in load_adapter(path, scale=20.0).entries] == [20.0]


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"q.lora_a": np.ones((6, 2))}, config(), "pairs"),
        ({"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((3, 10))}, config(), "no pair"),
        ({"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((2, 10)), "q.x": np.ones(2)}, config(), r"q\.x"),
        ({"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((2, 10))}, config(scale=0.0), "other than 0"),
        ({"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((2, 10))}, {"fine_tune_type": "lora"}, "no lora_parameters"),
        ({"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((2, 10))}, config("prompt"), "'prompt'"),
        (
            {"q.lora_a": np.ones((6, 2)), "q.lora_b": np.ones((2, 10)), "q.m": np.ones(7)},
            config("dora"),
            "fits no side",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, tensors: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraccError, match=message):
        load_adapter(save(tmp_path, tensors, settings))
