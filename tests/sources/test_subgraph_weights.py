"""Weights inside If and Loop, in Constant nodes, behind functions: read, bound by content, folded and verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h
from safetensors.numpy import save_file

from loracc.cli import run
from loracc.sources.onnx_model import read_graph

NAMES = ("then", "other", "loop", "inside", "constant", "function", "turned")
N = 8


def floats(name: str) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, TensorProto.FLOAT, ["n", N])


def model(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``y = turned(function(constant(loop(if cond: then(x), else: other(inside(x))))))``, nothing named for what it is.

    Both branches of the If call their own weight "w", and so does the main graph call something else.
    """

    def tensor(key: str, name: str) -> onnx.TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(weights[f"{key}.weight"].T), name)

    then = h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["t"], "n1")], "then", [], [floats("t")], [tensor("then", "w")]
    )
    inner = h.make_node("Constant", [], ["c"], "n2", value=tensor("inside", "c"))
    other = h.make_graph(
        [inner, h.make_node("MatMul", ["x", "c"], ["e1"], "n3"), h.make_node("MatMul", ["e1", "w"], ["e"], "n4")],
        "else",
        [],
        [floats("e")],
        [tensor("other", "w")],
    )
    flag, step = (h.make_tensor_value_info(n, t, []) for n, t in (("go", TensorProto.BOOL), ("i", TensorProto.INT64)))
    body = h.make_graph(
        [
            h.make_node("MatMul", ["state", "v"], ["m"], "n5"),
            h.make_node("Tanh", ["m"], ["next"], "n6"),
            h.make_node("Identity", ["go"], ["on"], "n7"),
        ],
        "body",
        [step, flag, floats("state")],
        [h.make_tensor_value_info("on", TensorProto.BOOL, []), floats("next")],
        [tensor("loop", "v")],
    )
    nodes = [
        h.make_node("If", ["cond"], ["a"], "n8", then_branch=then, else_branch=other),
        h.make_node("Loop", ["three", "true", "a"], ["b"], "n9", body=body),
        h.make_node("Constant", [], ["k"], "n10", value=tensor("constant", "k")),
        h.make_node("MatMul", ["b", "k"], ["d"], "n11"),
        h.make_node("Apply", ["d", "f"], ["g"], "n12", domain="local"),
        h.make_node("Transpose", ["r"], ["rt"], "n13"),
        h.make_node("MatMul", ["g", "rt"], ["y"], "n14"),
    ]
    function = h.make_function(
        "local", "Apply", ["p", "q"], ["o"], [h.make_node("MatMul", ["p", "q"], ["o"], "n15")], [h.make_opsetid("", 18)]
    )
    graph = h.make_graph(
        nodes,
        "g",
        [floats("x"), h.make_tensor_value_info("cond", TensorProto.BOOL, [])],
        [floats("y")],
        [
            numpy_helper.from_array(np.array(3), "three"),
            numpy_helper.from_array(np.array(True), "true"),
            tensor("function", "f"),
            numpy_helper.from_array(weights["turned.weight"], "r"),
        ],
    )
    opsets = [h.make_opsetid("", 18), h.make_opsetid("local", 1)]
    made = h.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal((N, N)).astype(np.float32) for name in NAMES}
    save_file(weights, tmp_path / "base.safetensors")
    onnx.save(model(weights), tmp_path / "model.onnx")
    factors = {}
    for name in NAMES:
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, N)).astype(np.float32) * 0.3
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((N, 2)).astype(np.float32) * 0.3
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(NAMES)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = {
        f"{name}.weight": weights[f"{name}.weight"]
        + factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
        for name in NAMES
    }
    onnx.save(model(merged), tmp_path / "merged.onnx")
    return tmp_path


def test_names_stay_apart(folder: Path) -> None:
    graph = read_graph(folder / "model.onnx").graph
    assert not [value for body in graph.subgraphs() for value in body.initializers.values()]
    assert len({value.name for value in graph.initializers.values()}) == len(graph.initializers)


def test_folded_by_content(folder: Path) -> None:
    import onnxruntime

    out = folder / "out.onnx"
    command = ["fold", str(folder / "model.onnx"), str(folder / "adapter"), "--base", str(folder / "base.safetensors")]
    assert run([*command, "-o", str(out), "--quiet"]) == 0
    onnx.checker.check_model(str(out), full_check=True)
    x = np.random.default_rng(1).standard_normal((3, N)).astype(np.float32)
    for condition in (True, False):
        feeds = {"x": x, "cond": np.array(condition)}
        got, expected = (
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
            for path in (out, folder / "merged.onnx")
        )
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
