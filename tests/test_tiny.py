"""The whole of loracc in a few seconds: it runs first, and when it fails nothing else needs to be looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.cli import run

R, IN, OUT, ALPHA = 4, 16, 24, 8.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An ONNX file as somebody else exported it: x @ W + b, W stored as [in, out]."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((IN, OUT)).astype(np.float32)
    bias = rng.standard_normal(OUT).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "/fc/MatMul"),
            helper.make_node("Add", ["h", "fc.bias"], ["h2"], "/fc/Add"),
            helper.make_node("Tanh", ["h2"], ["y"], "/Tanh"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUT])],
        [numpy_helper.from_array(weight, "fc.weight"), numpy_helper.from_array(bias, "fc.bias")],
    )
    path = tmp_path / "base.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A PEFT adapter for it, as PEFT writes one."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "base_model.model.fc.lora_A.weight": rng.standard_normal((R, IN)).astype(np.float32),
        "base_model.model.fc.lora_B.weight": rng.standard_normal((OUT, R)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_fold_verify_inspect(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert run(["fold", str(base), str(adapter), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["verdict"] == "pass"
    assert [site["name"] for site in result["sites"]] == ["fc.weight"]
    assert result["unmatched"] == []

    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.fc.lora_{x}.weight"].astype(np.float64) for x in "AB")
    expected = (weights(base)["fc.weight"].astype(np.float64) + (ALPHA / R) * (b @ a).T).astype(np.float32)
    np.testing.assert_array_equal(weights(out)["fc.weight"], expected)
    np.testing.assert_array_equal(weights(out)["fc.bias"], weights(base)["fc.bias"])

    assert run(["verify", str(base), str(out), "--adapter", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    assert run(["verify", str(base), str(base), "--adapter", str(adapter), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "fail"
    assert run(["inspect", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "peft"


def test_the_same_inputs_give_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    for out in (first, second):
        assert run(["fold", str(base), str(adapter), "-o", str(out), "--quiet"]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_an_unmatched_key_is_an_error(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        "base_model.model.fd.lora_A.weight": np.ones((R, IN), np.float32),
        "base_model.model.fd.lora_B.weight": np.ones((OUT, R), np.float32),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    out = tmp_path / "out.onnx"
    assert run(["fold", str(base), str(adapter), "-o", str(out)]) == 2
    message = capsys.readouterr().err
    assert "fd" in message and "fc" in message and "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.onnx"]
