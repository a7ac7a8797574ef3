"""TensorRT engines, built by TensorRT for RTX: its builder needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.cli import run

pytestmark = pytest.mark.rtx

IN, OUT, R = 64, 48, 4
PROFILE = ["--profile", f"x:1x{IN}:4x{IN}:16x{IN}"]
#: The same rank of both factors: 1 to 6, best 2.
RANKS = {"fc.lora_A.weight": f"{IN}x1:{IN}x2:{IN}x6", "fc.lora_B.weight": f"1x{OUT}:2x{OUT}:6x{OUT}"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.onnx (two layers with different weights), an adapter for the first, and the folded file."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    weights = {
        "fc.weight": rng.standard_normal((IN, OUT)).astype(np.float32),
        "head.weight": rng.standard_normal((OUT, OUT)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "/fc/MatMul"),
            helper.make_node("Relu", ["h"], ["r"], "/Relu"),
            helper.make_node("MatMul", ["r", "head.weight"], ["y"], "/head/MatMul"),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", OUT])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "base.onnx")
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 8, "target_modules": ["fc"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.fc.lora_A.weight": rng.standard_normal((R, IN)).astype(np.float32),
        "base_model.model.fc.lora_B.weight": rng.standard_normal((OUT, R)).astype(np.float32),
    }
    save_file(factors, "adapter/adapter_model.safetensors")
    assert run(["fold", "base.onnx", "adapter", "-o", "folded.onnx", "--quiet"]) == 0
    return tmp_path


def build(*arguments: str) -> int:
    return run(["build-trt", *arguments, "--flavor", "rtx", "--quiet"])


def test_an_adapter_folded_in_memory_gives_the_folded_files_plan(here: Path) -> None:
    assert build("folded.onnx", "-o", "folded.engine", *PROFILE) == 0
    assert build("base.onnx", "--adapter", "adapter", "-o", "memory.engine", *PROFILE) == 0
    assert Path("folded.engine").read_bytes() == Path("memory.engine").read_bytes()
    manifest = json.loads(Path("memory.engine.json").read_text())
    assert manifest["flavor"] == "rtx" and manifest["profiles"] == [{"x": [[1, IN], [4, IN], [16, IN]]}]


def test_base_and_folded_plans_differ_in_the_folded_weight_only(here: Path) -> None:
    assert build("base.onnx", "-o", "base.engine", *PROFILE) == 0
    assert build("folded.onnx", "-o", "folded.engine", *PROFILE) == 0
    one, two = (np.frombuffer(Path(f"{name}.engine").read_bytes(), np.uint8) for name in ("base", "folded"))
    assert one.size == two.size
    changed = np.flatnonzero(one != two)
    assert changed.size and np.ptp(changed) < IN * OUT * 4
    manifests = [json.loads(Path(f"{name}.engine.json").read_text()) for name in ("base", "folded")]
    assert manifests[0]["plan_sha256"] != manifests[1]["plan_sha256"]


#: arguments -> words that the message must have
WRONG = {
    "base.onnx -o out.engine": ("'x'", "dynamic", "--profile x:"),
    f"base.onnx -o out.engine --profile y:1x{IN}:1x{IN}:1x{IN}": ("no input 'y'",),
    f"base.onnx -o out.engine --profile x:9x{IN}:4x{IN}:16x{IN}": ("min ≤ opt ≤ max",),
    "base.onnx -o out.engine --profile x:1x3:1x3:1x3": ("axis 1", f"fixed at {IN}"),
    f"base.onnx -o out.engine --profile x:1:4x{IN}:16x{IN}": ("has 2 axes",),
    "base.onnx -o out.engine --profile x": ("NAME:MIN:OPT:MAX",),
    f"base.onnx -o out.engine --profile x:1x{IN}:4x{IN}:4294967296x{IN}": ("at most 2147483647",),
    f"base.onnx -o out.engine --profile x:1x{IN}:4x{IN}:16x{IN} --error-on-timing-cache-miss": ("no timing cache",),
    "base.onnx -o out.txt": (".engine or .plan",),
    "nowhere.onnx -o out.engine": ("nowhere.onnx", "no such"),
    "adapter/adapter_model.safetensors -o out.engine": ("adapter",),
    f"base.onnx -o out.engine --strip --profile x:1x{IN}:1x{IN}:1x{IN}": ("--refittable",),
    f"base.onnx -o out.engine --refittable all --profile x:1x{IN}:1x{IN}:1x{IN}": ("built no engine", "GPU"),
    f"base.onnx -o out.engine --flavor tensorrt --profile x:1x{IN}:1x{IN}:1x{IN}": ("pip install 'loracc[trt]'",),
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_calls(arguments: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flavor = [] if "--flavor" in arguments else ["--flavor", "rtx"]
    assert run(["build-trt", *arguments.split(), *flavor]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in WRONG[arguments]:
        assert word in said
    assert not list(here.glob("*out*"))


def test_an_operator_that_tensorrt_does_not_know_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("base.onnx")
    model.graph.node[1].op_type, model.graph.node[1].domain = "Wobble", "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    onnx.save(model, "odd.onnx")
    assert run(["build-trt", "odd.onnx", "-o", "out.engine", "--flavor", "rtx", *PROFILE]) == 2
    assert "Wobble" in capsys.readouterr().err


def test_a_graph_with_switchable_factors_keeps_them_as_inputs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attach", "base.onnx", "adapter", "--as", "inputs", "-o", "attached.onnx", "--quiet"]) == 0
    factors = {"fc.lora_A.weight", "fc.lora_B.weight"}
    assert factors <= {tensor.name for tensor in onnx.load("attached.onnx").graph.initializer}, "defaults, as attached"
    assert build("attached.onnx", "-o", "out.engine", *PROFILE) == 2
    assert "--max-rank" in capsys.readouterr().err and not Path("out.engine").exists()
    assert build("attached.onnx", "-o", "out.engine", "--max-rank", str(R), *PROFILE) == 0
    manifest = json.loads(Path("out.engine.json").read_text())
    assert {said["name"] for said in manifest["inputs"]} == {"x", *factors} and not factors & set(manifest["weights"])
    ranges = {name: found for name, found in manifest["profiles"][0].items() if name != "x"}
    assert ranges == {
        "fc.lora_A.weight": [[IN, 0], [IN, R], [IN, R]],
        "fc.lora_B.weight": [[0, OUT], [R, OUT], [R, OUT]],
    }
    ranked = [f"--profile={name}:{shapes}" for name, shapes in RANKS.items()]
    assert build("attached.onnx", "-o", "own.engine", *PROFILE, *ranked) == 0
    # The builder knows them as inputs: it refuses ranges that are not of one rank.
    assert build("attached.onnx", "-o", "odd.engine", *PROFILE, ranked[0], "--max-rank", "7") == 2
    assert "fc.rank must be equal" in capsys.readouterr().err


def test_max_rank_is_for_switchable_graphs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("base.onnx", "-o", "out.engine", "--max-rank", "4", *PROFILE) == 2
    assert "the graph has none" in capsys.readouterr().err


def test_weights_that_are_inputs_too_stay_constants_of_a_plain_graph(here: Path) -> None:
    model = onnx.load("base.onnx")
    for name, shape in {"fc.weight": (IN, OUT), "head.weight": (OUT, OUT)}.items():
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(model, "kept.onnx")
    assert build("base.onnx", "-o", "base.engine", *PROFILE) == 0
    assert build("kept.onnx", "-o", "kept.engine", *PROFILE) == 0
    assert Path("base.engine").read_bytes() == Path("kept.engine").read_bytes()


@pytest.mark.parametrize("size", [0, 7, 500])
def test_a_corrupt_file_is_refused(size: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("corrupt.onnx").write_bytes(Path("base.onnx").read_bytes()[:size])
    assert build("corrupt.onnx", "-o", "out.engine", *PROFILE) == 2
    said = capsys.readouterr().err
    assert "corrupt.onnx" in said and "Traceback" not in said and not list(here.glob("out*"))


def test_missing_external_data_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("base.onnx")
    onnx.save(model, "parts.onnx", save_as_external_data=True, location="parts.data", size_threshold=0)
    Path("parts.data").unlink()
    assert build("parts.onnx", "-o", "out.engine", *PROFILE) == 2
    said = capsys.readouterr().err
    assert "fc.weight" in said and "parts.data" in said and "missing" in said
    assert "Traceback" not in said and not list(here.glob("out*"))
