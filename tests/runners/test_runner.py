"""Runners: files and lazy graphs give the same numbers; what the runtime refuses is the user's error."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from loracc.errors import MissingExtraError
from loracc.runners.runner import OnnxRunner, RunError
from tests.verifying import bind, build, folded, write


def test_a_lazy_graph_and_its_file_agree(tmp_path: Path) -> None:
    base = build("attention")
    graph = folded(base, bind(base))
    before = [value.const_value for value in graph.graph.initializers.values()]
    file = write(base, graph, tmp_path / "m.onnx").path
    inputs = {"input_ids": np.arange(12).reshape(2, 6)}
    one, two = OnnxRunner(graph, threads=1), OnnxRunner(file, threads=1)
    assert one.inputs == two.inputs == ["input_ids"] and one.outputs == ["logits"]
    np.testing.assert_array_equal(one.run(inputs)["logits"], two.run(inputs)["logits"])
    assert [value.const_value for value in graph.graph.initializers.values()] == before  # given back as it was


def test_bfloat16_inputs_and_outputs_keep_their_bits() -> None:
    bf16 = ir.DataType.BFLOAT16
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(bf16))
    turn = ir.node("Transpose", [x], attributes={"perm": [1, 0]})
    turn.outputs[0].name, turn.outputs[0].dtype = "y", bf16
    model = ir.Model(ir.Graph([x], turn.outputs, nodes=[turn], opset_imports={"": 18}, name="g"), ir_version=10)
    array = np.random.default_rng(0).standard_normal((2, 3)).astype(ml_dtypes.bfloat16)
    result = OnnxRunner(model).run({"x": array})["y"]
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result, array.T)


def test_refusals_are_users_errors(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    with pytest.raises(RunError, match="does not load the model"):
        OnnxRunner(tmp_path / "garbage.onnx")
    model = build("mlp").ir
    runner = OnnxRunner(model)
    with pytest.raises(RunError, match="no value for the model's inputs x"):
        runner.run({})
    with pytest.raises(RunError, match="does not run the model"):
        runner.run({"x": np.zeros((2, 3), np.float32)})


def test_a_provider_that_is_not_there_is_said() -> None:
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(RunError, match="no cuda provider") as caught:
        OnnxRunner(build("mlp").ir, provider="cuda")
    assert caught.value.hint is not None and "gpu" in caught.value.hint


def test_without_onnxruntime_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime is needed") as caught:
        OnnxRunner(build("mlp").ir)
    assert caught.value.hint == "Run: pip install 'loracc[cpu]'"


def test_the_optimized_graph_can_be_saved(tmp_path: Path) -> None:
    OnnxRunner(build("attention").ir, save_optimized=tmp_path / "o.onnx")
    optimized = onnx.load(tmp_path / "o.onnx")
    assert 0 < len(optimized.graph.node) < len(build("attention").ir.graph)
