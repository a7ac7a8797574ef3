"""PEFT adapter folders written by hand, for tests of what the reader accepts and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loracc.dtypes import Array

__all__ = ["PREFIX", "lora", "random_array", "write_adapter"]

PREFIX = "base_model.model."


def random_array(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def lora(module: str, out: int = 6, inner: int = 5, r: int = 2, *, name: str = "", seed: int = 0) -> dict[str, Array]:
    """A linear layer's two factors under PEFT's keys; ``name`` is an adapter's name in the middle of the key."""
    middle = f".{name}" if name else ""
    return {
        f"{PREFIX}{module}.lora_A{middle}.weight": random_array(r, inner, seed=seed),
        f"{PREFIX}{module}.lora_B{middle}.weight": random_array(out, r, seed=seed + 1),
    }


def write_adapter(folder: Path, tensors: dict[str, Array], config: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Write a folder; ``fields`` are added to a minimal configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is None:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["fc"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
