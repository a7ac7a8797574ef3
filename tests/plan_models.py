"""Small graphs, and an adapter, for TensorRT plans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

__all__ = ["N", "R", "write_adapter", "write_attention", "write_model"]

#: Width and rank.
N, R = 32, 2


def write_adapter(folder: str, out: int = N, *, seed: int = 1) -> None:
    """A LoRA for the layer ``fc``, which has ``out`` outputs."""
    rng = np.random.default_rng(seed)
    Path(folder).mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["fc"]}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.fc.lora_{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"A": (R, N), "B": (out, R)}.items()
    }
    save_file(factors, Path(folder, "adapter_model.safetensors"))


def write_model(path: str, dtype: type[np.floating], *, equal: bool = False, external: bool = False) -> None:
    """Two layers and a bias; with ``equal``, both weights are the same."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((N, N)).astype(dtype) for _ in range(2))
    weights = {"fc.weight": first, "head.weight": first if equal else second, "head.bias": second[0]}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "/fc/MatMul"),
            helper.make_node("Relu", ["h"], ["r"], "/Relu"),
            helper.make_node("MatMul", ["r", "head.weight"], ["m"], "/head/MatMul"),
            helper.make_node("Add", ["m", "head.bias"], ["y"], "/head/Add"),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", kind, ["batch", N])],
        [helper.make_tensor_value_info("y", kind, ["batch", N])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location=f"{path}.data")


def write_attention(path: str, dtype: type[np.floating]) -> None:
    """Query, key and value in one product, then split, as in GPT-2."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {"fc.weight": rng.standard_normal((N, 3 * N)), "head.weight": rng.standard_normal((N, N))}
    shapes = {"heads": [0, 0, 2, N // 2], "joined": [0, 0, N]}

    def heads(name: str, *perm: int) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Reshape", [name, "heads"], [f"{name}_r"], f"/{name}/Reshape"),
            helper.make_node("Transpose", [f"{name}_r"], [f"{name}_t"], f"/{name}/Transpose", perm=perm),
        ]

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["m"], "/fc/MatMul"),
            helper.make_node("Add", ["m", "fc.bias"], ["qkv"], "/fc/Add"),
            helper.make_node("Split", ["qkv"], ["q", "k", "v"], "/Split", axis=-1, num_outputs=3),
            *heads("q", 0, 2, 1, 3),
            *heads("k", 0, 2, 3, 1),
            *heads("v", 0, 2, 1, 3),
            helper.make_node("MatMul", ["q_t", "k_t"], ["s"], "/MatMul"),
            helper.make_node("Softmax", ["s"], ["p"], "/Softmax", axis=-1),
            helper.make_node("MatMul", ["p", "v_t"], ["a"], "/MatMul_1"),
            helper.make_node("Transpose", ["a"], ["a_t"], "/Transpose", perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["a_t", "joined"], ["j"], "/Reshape"),
            helper.make_node("MatMul", ["j", "head.weight"], ["y"], "/head/MatMul"),
        ],
        "attention",
        [helper.make_tensor_value_info("x", kind, ["batch", "sequence", N])],
        [helper.make_tensor_value_info("y", kind, ["batch", "sequence", N])],
        [
            *(numpy_helper.from_array(weight.astype(dtype), name) for name, weight in weights.items()),
            numpy_helper.from_array(rng.standard_normal(3 * N).astype(dtype), "fc.bias"),
            *(numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
