"""Tiny models with random weights, and PEFT adapters for them whose B is not zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "Family", "adapted", "build", "randomize", "save_base", "text_inputs"]


@dataclass(frozen=True)
class Family:
    """One architecture of the table.

    Attributes:
        model: Class name in transformers.
        config: Class name of its configuration.
        settings: Configuration values that make it tiny.
        lora: Arguments of PEFT's LoraConfig.
        vision: Takes pixel_values.
    """

    model: str
    config: str
    settings: dict[str, Any]
    lora: dict[str, Any]
    vision: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


_BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2}

FAMILIES: dict[str, Family] = {
    "bert": Family("BertModel", "BertConfig", _BERT, {"target_modules": ["query", "value", "dense"]}),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 99,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT, "max_position_embeddings": 66, "pad_token_id": 1},
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "deberta": Family(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "max_position_embeddings": 64,
        },
        {"target_modules": ["query_proj", "value_proj", "key_proj"]},
    ),
    "vit": Family(
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 16,
            "patch_size": 4,
        },
        {"target_modules": ["q_proj", "v_proj", "projection"]},
        vision=True,
    ),
    "t5": Family(
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        {"target_modules": ["q", "v", "wi", "wo"]},
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        {"target_modules": ["convolution", "classifier.1"]},
        vision=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ),
}


def build(name: str, *, dtype: str = "float32", seed: int = 0) -> Any:
    """A tiny model of the family with random weights, in eval mode."""
    import torch
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**family.settings)
    model = getattr(transformers, family.model)(config)
    return randomize(model, seed=seed, scale=0.2).to(getattr(torch, dtype)).eval()


def randomize(module: Any, *, seed: int, scale: float, names: Callable[[str], bool] = lambda _name: True) -> Any:
    """Fill zero and one initialised parameters (biases, norms, LoRA's B) with noise, so that no mistake hides there."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if names(name) and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * scale
                constant = bool((parameter == parameter.flatten()[0]).all()) if parameter.numel() else False
                parameter.copy_(parameter + noise if constant else parameter)
    return module


def adapted(model: Any, *, seed: int = 1, r: int = 4, lora_alpha: int = 8, scale: float = 0.1, **lora: Any) -> Any:
    """PEFT's model around ``model``, every adapter parameter random and non-zero, in eval mode."""
    import peft
    import torch

    result = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=lora_alpha, **lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    return result.eval()


def save_base(model: Any, folder: Path) -> Path:
    """Save as a Hugging Face folder."""
    model.save_pretrained(folder)
    return folder


def text_inputs(batch: int = 2, sequence: int = 7, *, vocabulary: int = 99, seed: int = 0) -> dict[str, np.ndarray]:
    """Token ids and a mask with padding at the end of the last row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocabulary, (batch, sequence), dtype=np.int64)
    mask = np.ones((batch, sequence), np.int64)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(name: str, batch: int = 2, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels of the family's image size."""
    side = FAMILIES[name].settings.get("image_size", 32)
    return {"pixel_values": np.random.default_rng(seed).standard_normal((batch, 3, side, side)).astype(np.float32)}


def torch_inputs(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same inputs for PyTorch."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}
