"""A tiny model whose outputs are named as hostilely as a file may name them, and an adapter for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

__all__ = ["HOSTILE", "SIZE", "model_and_adapter", "spoil"]

HOSTILE = "q<img src=x onerror=alert('1')>$x_1$|&\"`*"
SIZE, LAYERS, RANK = 12, 3, 2


def _modules() -> list[str]:
    return [f"block.{layer}.{part}" for layer in range(LAYERS) for part in ("query", "out")]


def model_and_adapter(folder: Path) -> tuple[Path, Path]:
    """``base.onnx`` and ``adapter/``: six linear layers, a delta for each."""
    rng = np.random.default_rng(0)
    nodes, weights, at = [], [], "x"
    for index, module in enumerate(_modules()):
        name = f"{module}.weight"
        weights.append(numpy_helper.from_array(rng.standard_normal((SIZE, SIZE)).astype(np.float32) / 4, name))
        nodes.append(helper.make_node("MatMul", [at, name], [f"h{index}"], f"mm{index}"))
        at = HOSTILE if index == len(_modules()) - 1 else f"t{index}"
        nodes.append(helper.make_node("Tanh", [f"h{index}"], [at], f"tanh{index}"))
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE]) for name in ("x", HOSTILE)]
    graph = helper.make_graph(nodes, "tiny", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "base.onnx")

    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["query", "out"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module in _modules():
        for letter, shape in (("A", (RANK, SIZE)), ("B", (SIZE, RANK))):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[key] = rng.standard_normal(shape).astype(np.float32) / 8
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return folder / "base.onnx", folder / "adapter"


def spoil(path: Path, to: Path) -> Path:
    """``path`` with one weight changed where it must not be."""
    model = onnx.load(path)
    weight = model.graph.initializer[2]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, to)
    return to
