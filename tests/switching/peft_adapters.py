"""Tiny models with several PEFT adapters, and what PEFT's own unmerged forward gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests import models

__all__ = ["Array", "adapter", "forward", "session"]

Array = np.ndarray[Any, Any]


def adapter(family: str, folder: Path, *, seed: int = 1, dtype: str = "float32", **lora: Any) -> Path:
    """A PEFT adapter for the family's tiny model, saved."""
    options = {**models.FAMILIES[family].lora, **lora}
    model = models.adapted(models.build(family, dtype=dtype), seed=seed, **options)
    model.save_pretrained(folder)
    return folder


def forward(
    family: str, inputs: dict[str, Array], path: Path | None, *, dtype: str = "float32", weight: float = 1.0
) -> Array:
    """The first output of PyTorch, the adapter unmerged and at a weight."""
    import peft
    import torch

    model: Any = models.build(family, dtype=dtype)
    if path is not None:
        model = peft.PeftModel.from_pretrained(model, path).eval()
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling = {name: value * weight for name, value in module.scaling.items()}
    with torch.no_grad():
        result = model(**models.torch_inputs(inputs))[0]
    return np.asarray(result.float().numpy())


def session(path: Path) -> Any:
    """A silent session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)
