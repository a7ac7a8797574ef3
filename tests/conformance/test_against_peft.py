"""Every kind of adapter on every kind of layer: the folded weights against PEFT's own unmerged forward, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loracc.errors import BindingError, UnsupportedError
from loracc.formats import load_adapter
from loracc.lower import lower
from loracc.model import BaseModel, LoadOptions
from loracc.passes.bind_adapter import bind
from loracc.sources.checkpoint import load_checkpoint
from tests.conformance.layers import LAYERS, Model, targets, token_model

pytestmark = [
    # PEFT warns about what these models do on purpose (lora_bias without a base bias, no model card).
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # Its check of patterns does not know the names of target_parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {
        "rank_pattern": {r"(.*\.)?(layer|attn|down_proj)": 3},
        "alpha_pattern": {"layer|attn|gate_up_proj": 5},
    },
    "bias all": {"bias": "all"},
    "bias only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head", "norm"]},
}
#: What PEFT itself refuses, or ignores in its forward.
NOT_IN_PEFT = {
    "attention": {"dora", "dora rslora", "lora_bias"},
    "embedding": {"lora_bias"},
    "experts": {"dora", "dora rslora", "lora_bias"},
    "linear no bias": {"lora_bias"},
    "conv2d 1x1": {"lora_bias"},
}
CASES = [
    (layer, kind)
    for layer in LAYERS
    for kind in KINDS
    if kind not in NOT_IN_PEFT.get(layer, NOT_IN_PEFT.get(layer.partition(" ")[0], set()))
]


def _build(layer: str) -> Model:
    return token_model() if layer == "tokens" else LAYERS[layer]()


def adapted(layer: str, folder: Path, seed: int = 0, **lora: Any) -> tuple[Model, Any]:
    """(base, PEFT's model with random adapter); the base's state dict and the adapter are saved."""
    import peft

    torch.manual_seed(seed)
    base = _build(layer).double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    save_file(base.state_dict(), folder / "base.safetensors")
    model = _build(layer).double().eval()
    model.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=3, **{**targets(layer), **lora})
    wrapped = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    wrapped.save_pretrained(str(folder / "adapter"))
    return base, wrapped.eval()


def fold(folder: Path) -> BaseModel:
    model = load_checkpoint(folder / "base.safetensors", LoadOptions(graph=False))
    bind(model, [load_adapter(folder / "adapter")])
    return lower(model)


def folded_state(model: BaseModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.ir.graph.initializers.items():
        assert value.const_value is not None
        found[name] = torch.from_numpy(value.const_value.numpy().copy())
    return found


def largest_relative_error(base: Model, wrapped: Any, state: dict[str, torch.Tensor]) -> float:
    x = base.inputs()
    with torch.no_grad():
        before = base(x)
        base.load_state_dict(state)
        got, expected = base(x), wrapped(x)
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max(), "the adapter changes nothing: no test"
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("layer", "kind"), CASES, ids=[f"{layer}, {kind}" for layer, kind in CASES])
def test_folded_equals_unmerged(layer: str, kind: str, tmp_path: Path) -> None:
    base, wrapped = adapted(layer, tmp_path, **KINDS[kind])
    error = largest_relative_error(base, wrapped, folded_state(fold(tmp_path)))
    assert error < 1e-12


def test_token_rows(tmp_path: Path) -> None:
    base, wrapped = adapted(
        "tokens", tmp_path, target_modules=["head"], trainable_token_indices={"tokens": [2, 9, 4, 0, 1, 3]}
    )
    assert largest_relative_error(base, wrapped, folded_state(fold(tmp_path))) < 1e-12


def test_a_bias_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    """PEFT runs it unmerged and cannot merge it; no weight could hold it."""
    adapted("linear no bias", tmp_path, lora_bias=True)
    with pytest.raises(BindingError, match="does not have cannot be folded"):
        fold(tmp_path)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    import peft

    from tests.conformance import layers

    model = layers.Model(torch.nn.Conv2d(4, 4, 3, groups=2), lambda: torch.zeros(1)).double()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer"]))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UnsupportedError, match="2 groups"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("layer", ["linear", "Conv1D", "embedding", "conv2d", "experts out-in"])
def test_strength_is_pefts_scaling(layer: str, tmp_path: Path) -> None:
    """``PATH@0.7`` is what PEFT's ``scale_layer(0.7)`` does."""
    from peft.tuners.lora.layer import LoraLayer

    base, wrapped = adapted(layer, tmp_path)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 0.7  # PEFT's scale_layer leaves embeddings out (docs/upstream.md)
    model = load_checkpoint(tmp_path / "base.safetensors", LoadOptions(graph=False))
    bind(model, [load_adapter(tmp_path / "adapter").scaled(0.7)])
    assert largest_relative_error(base, wrapped, folded_state(lower(model))) < 1e-12


@pytest.mark.parametrize("kind", ["lora", "rslora", "lora_bias"])
def test_two_adapters_add_up(kind: str, tmp_path: Path) -> None:
    """Both active in PEFT, which adds their changes to the base's output."""
    import peft

    base, wrapped = adapted("linear", tmp_path, **KINDS[kind])
    other = tmp_path / "other"
    other.mkdir()
    adapted("linear", other, seed=1, **KINDS[kind])
    wrapped.load_adapter(str(other / "adapter"), "other")
    wrapped.base_model.set_adapter(["default", "other"])
    assert isinstance(wrapped, peft.PeftModel)
    model = load_checkpoint(tmp_path / "base.safetensors", LoadOptions(graph=False))
    bind(model, [load_adapter(folder / "adapter", name=folder.name) for folder in (tmp_path, other)])
    assert largest_relative_error(base, wrapped.double(), folded_state(lower(model))) < 1e-12


def test_bin_and_named_adapters(tmp_path: Path) -> None:
    base, wrapped = adapted("linear", tmp_path)
    wrapped.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    assert largest_relative_error(base, wrapped, folded_state(fold(tmp_path))) < 1e-12
