"""A tiny base in ONNX, adapters for it, and deployments of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loracc.dtypes import Array
from loracc.switching.attaching import attach
from loracc.switching.request import AttachResult
from tests.formats.peft_files import lora, write_adapter

__all__ = ["INNER", "WIDTH", "adapter", "attach_variants", "base", "deployment", "feed", "outputs"]

WIDTH, INNER = 32, 48


def base(folder: Path, name: str = "base.onnx", *, seed: int = 0, width: int = WIDTH, inner: int = INNER) -> Path:
    """``tanh(x @ W1 + b1) @ W2``, weights stored as [in, out]."""
    rng = np.random.default_rng(seed)
    arrays = {
        "fc1.weight": rng.standard_normal((width, inner)),
        "fc1.bias": rng.standard_normal(inner),
        "fc2.weight": rng.standard_normal((inner, width)),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc1.weight"], ["h"], "/fc1/MatMul"),
            helper.make_node("Add", ["h", "fc1.bias"], ["h2"], "/fc1/Add"),
            helper.make_node("Tanh", ["h2"], ["h3"], "/Tanh"),
            helper.make_node("MatMul", ["h3", "fc2.weight"], ["y"], "/fc2/MatMul"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(array.astype(np.float32), key) for key, array in arrays.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name)
    return folder / name


def adapter(
    folder: Path,
    *,
    seed: int = 1,
    modules: tuple[str, ...] = ("fc1", "fc2"),
    width: int = WIDTH,
    inner: int = INNER,
) -> Path:
    """A PEFT adapter of rank 2."""
    shapes = {"fc1": (inner, width), "fc2": (width, inner)}
    tensors: dict[str, Array] = {}
    for module in modules:
        tensors |= lora(module, *shapes.get(module, (width, width)), seed=10 * seed)
    return write_adapter(folder, tensors, target_modules=list(modules))


def attach_variants(model: Path, adapters: Sequence[str | Path], output: Path, **options: Any) -> AttachResult:
    """``loracc attach --as variants``."""
    return attach(model, adapters, output, mode="variants", **options)


def deployment(folder: Path, names: tuple[str, ...] = ("a", "b", "c"), *, verify: bool = False) -> Path:
    """``out.onnx`` with a variant a name; adapters lie beside it under the same names."""
    model = base(folder)
    adapters = [f"{name}={adapter(folder / name, seed=seed)}" for seed, name in enumerate(names, 1)]
    attach_variants(model, adapters, folder / "out.onnx", verify=verify)
    return folder / "out.onnx"


def feed(batch: int = 3, *, seed: int = 5) -> dict[str, Array]:
    """Random inputs."""
    return {"x": np.random.default_rng(seed).standard_normal((batch, WIDTH)).astype(np.float32)}


def outputs(path: Path, inputs: dict[str, Array]) -> list[Array]:
    """What plain ONNX Runtime computes from a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))
