"""Quantized operators in the forms that graphs have them in: made by hand where no quantizer makes them all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc import fold
from loracc.errors import LoraccError
from tests.quantizing import changed

Array = np.ndarray[Any, Any]
K, N = 24, 10
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def tensor(name: str, array: Array, kind: int | None = None) -> onnx.TensorProto:
    if kind is None:
        return numpy_helper.from_array(array, name)
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())
    return helper.make_tensor(name, kind, array.shape, array.ravel().astype(np.float32).tolist())


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    shape: Sequence[int | str] = ("n", K),
    *,
    kind: int = TensorProto.FLOAT,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def lora(folder: Path, inside: tuple[int, ...] = (K,), outside: int = N, *, bias: bool = False) -> Path:
    """An adapter of rank 2 for the module "fc"; ``inside`` with the kernel of a convolution."""
    rng = np.random.default_rng(3)
    a = (rng.standard_normal((2, *inside)) / 4).astype(np.float32)
    b = (rng.standard_normal((outside, 2, *(1 for _ in inside[1:]))) / 2).astype(np.float32)
    arrays = {"base_model.model.fc.lora_A.weight": a, "base_model.model.fc.lora_B.weight": b}
    if bias:
        arrays["base_model.model.fc.base_layer.bias"] = rng.standard_normal(outside).astype(np.float32)
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc"]}
    config |= {"bias": "lora_only"} if bias else {}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def nbits(path: Path, *, kind: str = "fp32", bias: bool = False, groups: Array | None = None, **options: int) -> Path:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (N, 2, 8), dtype=np.uint8)
    codes[:, 1, 4:] = 0x55  # what pads the last block: K is one and a half
    weights = [
        tensor("fc.weight_Q4", codes),
        tensor("fc.weight_scales", rng.uniform(0.01, 0.05, (N, 2)), FLOATS[kind]),
        tensor("fc.weight_zp", rng.integers(0, 256, (N, 1), dtype=np.uint8)),
    ]
    inputs = ["x", *(weight.name for weight in weights)]
    if groups is not None or bias:
        inputs.append("" if groups is None else "groups")
        weights += [] if groups is None else [tensor("groups", groups)]
    if bias:
        inputs.append("fc.bias")
        weights.append(tensor("fc.bias", rng.standard_normal(N), FLOATS[kind]))
    attributes: dict[str, Any] = {"K": K, "N": N, "bits": 4, "block_size": 16, **options}
    node = helper.make_node("MatMulNBits", inputs, ["y"], name="/fc/MatMul", domain="com.microsoft", **attributes)
    return save(path, [node], weights, kind=FLOATS[kind])


def folded(path: Path, adapter: Path) -> set[str]:
    """Fold with verification; what changed."""
    out = path.with_name("out.onnx")
    result = fold(path, [adapter], out)
    assert result.verification is not None and result.verification.verdict == "pass"
    return changed(path, out)


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_nbits(tmp_path: Path, kind: str, bias: bool) -> None:
    path = nbits(tmp_path / "base.onnx", kind=kind, bias=bias, accuracy_level=4)
    names = folded(path, lora(tmp_path / "adapter"))
    assert "fc.weight_Q4" in names and names <= {"fc.weight_Q4", "fc.weight_scales", "fc.weight_zp"}
    codes = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert (codes["fc.weight_Q4"][:, 1, 4:] == 0x55).all()


def test_matmul_nbits_groups(tmp_path: Path) -> None:
    """``g_idx`` that says what holds anyway is read; act-order is refused by name."""
    adapter = lora(tmp_path / "adapter")
    usual = np.arange(K, dtype=np.int32) // 16
    assert folded(nbits(tmp_path / "base.onnx", groups=usual), adapter)
    with pytest.raises(LoraccError, match="act-order"):
        fold(nbits(tmp_path / "other.onnx", groups=usual[::-1].copy()), [adapter], tmp_path / "no.onnx")


def test_prepacked_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraccError, match="prepacked"):
        fold(nbits(tmp_path / "a.onnx", weight_prepacked=1), [lora(tmp_path / "adapter")], tmp_path / "no.onnx")


@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_quantize_matmul(tmp_path: Path, per_column: bool) -> None:
    rng = np.random.default_rng(0)
    count = N if per_column else 1
    weights = [
        tensor("fc.weight_quantized", rng.integers(-127, 128, (K, N), dtype=np.int8)),
        tensor("fc.weight_scale", rng.uniform(0.01, 0.02, count).astype(np.float32)),
        tensor("fc.weight_zero_point", np.zeros(count, np.int8)),
        tensor("fc.bias", rng.standard_normal(N).astype(np.float32)),
    ]
    inputs = ["x", *(weight.name for weight in weights)]
    node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], name="/fc/MatMul", domain="com.microsoft")
    names = folded(save(tmp_path / "base.onnx", [node], weights), lora(tmp_path / "adapter"))
    assert names == {"fc.weight_quantized", "fc.weight_scale"}


SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tensor": ({}, ()),
    "in": ({"axis": 0}, (K,)),
    "out": ({"axis": -1}, (N,)),
    "blocks of in": ({"axis": 0, "block_size": 8}, (K // 8, N)),
    "blocks of out": ({"axis": 1, "block_size": 4}, (K, 3)),
}


@pytest.mark.parametrize("codes", ["INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"])
@pytest.mark.parametrize("blocks", SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantize_linear(tmp_path: Path, codes: str, blocks: str, zeros: bool) -> None:
    """Every code type and way to share scales, with a Transpose between for half of them."""
    rng = np.random.default_rng(0)
    signed, bits = codes.startswith("INT"), int(codes.lstrip("UINT"))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    attributes, shape = SHAPES[blocks]
    kind = getattr(TensorProto, codes)
    dtype = {4: np.int8 if signed else np.uint8, 8: np.int8 if signed else np.uint8}.get(
        bits, np.int16 if signed else np.uint16
    )

    def integers(shape: tuple[int, ...], low: int, high: int) -> Array:
        return rng.integers(low, high + 1, shape).astype(dtype)

    middle = (low + high + 1) // 2
    weights = [
        tensor("fc.weight_quantized", integers((K, N), low, high), kind if bits == 4 else None),
        tensor("fc.weight_scale", (rng.uniform(0.5, 1.0, shape) * 2.0 / (high - low)).astype(np.float32)),
    ]
    if zeros or not signed:
        near = integers(shape, middle - 1, middle + 1)
        weights.append(tensor("fc.weight_zero_point", near, kind if bits == 4 else None))
    nodes = [
        helper.make_node("DequantizeLinear", [w.name for w in weights], ["w"], name="/fc/DQ", **attributes),
        helper.make_node("Transpose", ["x"], ["t"], name="/turn", perm=[0, 1]),
        helper.make_node("MatMul", ["t", "w"], ["y"], name="/fc/MatMul"),
    ]
    names = folded(save(tmp_path / "base.onnx", nodes, weights), lora(tmp_path / "adapter"))
    assert "fc.weight_quantized" in names


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_narrow_scales(tmp_path: Path, kind: str) -> None:
    """The weight is cast before it is used, and turned: its site is found behind both."""
    rng = np.random.default_rng(0)
    weights = [
        tensor("fc.weight_quantized", rng.integers(-8, 8, (N, K)), TensorProto.INT4),
        tensor("fc.weight_scale", rng.uniform(0.01, 0.05, (N, 3)), FLOATS[kind]),
    ]
    names = [weight.name for weight in weights]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], name="/fc/DQ", axis=1, block_size=8),
        helper.make_node("Cast", ["w"], ["c"], name="/fc/Cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["c"], ["t"], name="/fc/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="/fc/MatMul"),
    ]
    path = save(tmp_path / "base.onnx", nodes, weights)
    assert folded(path, lora(tmp_path / "adapter")) <= set(names)


def test_convolution_with_a_bias(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        tensor("fc.weight_quantized", rng.integers(-127, 128, (6, 4, 3, 3), dtype=np.int8)),
        tensor("fc.weight_scale", rng.uniform(0.001, 0.002, 6).astype(np.float32)),
        tensor("fc.bias_quantized", rng.integers(-9999, 9999, 6, dtype=np.int32)),
        tensor("fc.bias_scale", rng.uniform(0.00001, 0.00002, 6).astype(np.float32)),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.weight_quantized", "fc.weight_scale"], ["w"], name="/fc/a", axis=0),
        helper.make_node("DequantizeLinear", ["fc.bias_quantized", "fc.bias_scale"], ["b"], name="/fc/b", axis=0),
        helper.make_node("Conv", ["x", "w", "b"], ["y"], name="/fc/Conv"),
    ]
    path = save(tmp_path / "base.onnx", nodes, weights, (1, 4, 8, 8))
    names = folded(path, lora(tmp_path / "adapter", (4, 3, 3), 6))
    assert names == {"fc.weight_quantized", "fc.weight_scale", "fc.bias_quantized", "fc.bias_scale"}


def test_one_reader_of_a_tied_weight(tmp_path: Path) -> None:
    """An embedding and a head with one quantized tensor: the head gets codes of its own."""
    rng = np.random.default_rng(0)
    weights = [
        tensor("emb.weight_quantized", rng.integers(-127, 128, (50, K), dtype=np.int8)),
        tensor("emb.weight_scale", rng.uniform(0.001, 0.002, 50).astype(np.float32)),
    ]
    dequantize = helper.make_node("DequantizeLinear", [w.name for w in weights], ["w"], name="/DQ", axis=0)
    nodes = [
        dequantize,
        helper.make_node("Cast", ["x"], ["ids"], name="/Cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["w", "ids"], ["h"], name="/emb/Gather"),
        helper.make_node("Transpose", ["w"], ["t"], name="/fc/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="/fc/MatMul"),
    ]
    path = save(tmp_path / "base.onnx", nodes, weights, ("n",))
    out = tmp_path / "out.onnx"
    result = fold(path, [lora(tmp_path / "adapter", outside=50)], out)
    assert result.verification is not None and result.verification.verdict == "pass"
    before, after = ({t.name: t for t in onnx.load(p).graph.initializer} for p in (path, out))
    assert all(after[name] == before[name] for name in before)
    assert len(after) == len(before) + 2
    assert [node.op_type for node in onnx.load(out).graph.node].count("DequantizeLinear") == 2
