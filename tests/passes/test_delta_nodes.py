"""Branches that are off leave every bit: signed zeros, NaN, infinities, and the runtime's own fusions around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

import loracc
from tests.graphs import Builder, run
from tests.switching.peft_adapters import session

IN, OUT = 8, 12


def adapter(folder: Path, *modules: str) -> Path:
    rng = np.random.default_rng(5)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((2, IN)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((OUT, 2)).astype(np.float32)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def model(kind: str, shape: list[int | str]) -> ir.Model:
    build = Builder(seed=3)
    x = build.input("x", shape)
    bias = np.where(np.arange(OUT) % 3, build.random(OUT), np.float32(-0.0)).astype(np.float32)
    weight = build.random(IN, OUT)
    weight[:, ::4] = -0.0
    if kind == "gemm":
        flat = build("Reshape", x, build.weight(np.array([-1, IN])))
        turned = build.weight(np.ascontiguousarray(weight.T), "lin.weight")
        return build.model(build("Relu", build("Gemm", flat, turned, build.weight(bias, "lin.bias"), transB=1)))
    if kind == "gemm without c":
        flat = build("Reshape", x, build.weight(np.array([-1, IN])))
        return build.model(build("Gemm", flat, build.weight(weight, "lin.weight"), alpha=0.5))
    product = build("MatMul", x, build.weight(weight, "lin.weight"))
    if kind == "bare":
        return build.model(product)
    total = build("Add", product, build.weight(bias, "lin.bias"))
    return build.model(build("Gelu", total, approximate="none") if kind == "gelu" else total, opset=20)


@pytest.mark.parametrize("kind", ["gemm", "gemm without c", "bare", "bias", "gelu"])
@pytest.mark.parametrize("shape", [["batch", "sequence", IN], [3, 5, IN]], ids=["dynamic", "static"])
@pytest.mark.parametrize("mode", ["inputs", "batched"])
def test_bits(kind: str, shape: list[int | str], mode: str, tmp_path: Path) -> None:
    base = model(kind, shape)
    ir.save(base, tmp_path / "base.onnx")
    given = adapter(tmp_path, "lin")
    loracc.attach(tmp_path / "base.onnx", [given], tmp_path / "o.onnx", mode=mode, alpha=3.0, verify=False)
    x = np.random.default_rng(0).standard_normal((3, 5, IN)).astype(np.float32)
    x[0, 0], x[1, 1, 3], x[1, 2, 2], x[2, 3] = -0.0, np.nan, np.inf, 1e-30
    ids: dict[str, Any] = {"adapter_ids": np.array([-1, -1, -1])} if mode == "batched" else {}
    plain = session(tmp_path / "base.onnx").run(None, {"x": x})[0]
    assert session(tmp_path / "o.onnx").run(None, {"x": x, **ids})[0].tobytes() == plain.tobytes()
    attached = ir.load(tmp_path / "o.onnx")
    [unoptimized] = run(attached, {"x": x, **ids})
    [expected] = run(base, {"x": x})
    assert unoptimized.tobytes() == expected.tobytes()
