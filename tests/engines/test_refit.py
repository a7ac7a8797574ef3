"""Refitting: without a GPU the refusals, and the sequence of calls against a strict fake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.cli import run
from loracc.devices import gpu_name
from loracc.errors import InputError, UnsupportedError
from loracc.targets import tensorrt_load
from loracc.targets.tensorrt_manifest import describe, manifest_name
from loracc.targets.tensorrt_module import TensorRT

pytestmark = pytest.mark.rtx

N, R = 8, 2
NAMES = ("one.weight", "two.weight", "three.weight")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.onnx of three layers, and the adapters "first" (one, two) and "second" (two, three)."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", [f"h{i}", name], [f"h{i + 1}"], f"/{name[:-7]}/MatMul")
        for i, name in enumerate(NAMES)
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", N])],
        [helper.make_tensor_value_info("h3", TensorProto.FLOAT, ["batch", N])],
        [numpy_helper.from_array(rng.standard_normal((N, N)).astype(np.float32), name) for name in NAMES],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "base.onnx")
    for adapter, modules in {"first": ("one", "two"), "second": ("two", "three")}.items():
        Path(adapter).mkdir()
        config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": list(modules)}
        Path(adapter, "adapter_config.json").write_text(json.dumps(config))
        factors = {
            f"base_model.model.{module}.lora_{side}.weight": rng.standard_normal(shape).astype(np.float32)
            for module in modules
            for side, shape in {"A": (R, N), "B": (N, R)}.items()
        }
        save_file(factors, Path(adapter, "adapter_model.safetensors"))
        assert run(["fold", "base.onnx", adapter, "-o", f"{adapter}.onnx", "--quiet"]) == 0
    return tmp_path


def bytes_of(model: str) -> dict[str, bytes]:
    return {w.name: numpy_helper.to_array(w).tobytes() for w in onnx.load(model).graph.initializer}


@pytest.fixture
def fake(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """base.engine in a fake TensorRT on a fake GPU."""
    from tests.fake_engine import FakeModule, plan_of

    module = FakeModule()

    logger = _logger(module)
    logger.messages = [("ERROR", "the library says why")]
    trt = TensorRT("rtx", module, logger)
    monkeypatch.setattr(tensorrt_load, "require_gpu", lambda *_: "a fake GPU")
    monkeypatch.setattr(tensorrt_load, "load_flavor", lambda *_: trt)
    plan = plan_of({name: ("FLOAT", data) for name, data in bytes_of("base.onnx").items()})
    write_engine(plan, "all")
    return module


def write_engine(plan: bytes, refittable: str, marked: tuple[str, ...] = (), name: str = "base.engine") -> None:
    from loracc.engines.build import load_onnx

    graph = load_onnx("base.onnx").ir
    options = {"refittable": refittable, "marked": list(marked), "version_compatible": False}
    said: dict[str, Any] = {
        "flavor": "rtx",
        "version": "fake",
        "gpu": None,
        "adapters": [],
        "sites": [],
        "profiles": [],
    }
    Path(name).write_bytes(plan)
    describe(plan, graph, model="base.onnx", options=options, **said).write(Path(manifest_name(Path(name))))


def test_switching_leaves_no_mixture(fake: Any) -> None:
    from loracc.runtime.trt_deployment import TrtDeployment

    deployment = TrtDeployment("base.engine")
    engine = fake.engines[0]

    def inside() -> dict[str, bytes]:
        return {name: data for name, (_, data) in engine._weights.items()}

    assert set(deployment.switch("first")) == {"one.weight", "two.weight"}
    assert inside() == bytes_of("first.onnx")
    assert set(deployment.switch("second")) == set(NAMES)  # "one" goes back to the base's bytes
    assert inside() == bytes_of("second.onnx")
    assert set(deployment.restore()) == {"two.weight", "three.weight"}
    assert inside() == bytes_of("base.onnx")
    assert deployment.restore() == () and deployment.changed == ()
    assert set(deployment.comparisons) == {"refittable base", "plain base"}


def test_weights_that_are_stored_together_are_sent_together(fake: Any) -> None:
    from loracc.runtime.trt_deployment import TrtDeployment

    fake.combined = [{"one.weight", "two.weight", "three.weight"}]
    deployment = TrtDeployment("base.engine")
    assert set(deployment.switch("first")) == set(NAMES)
    assert {name: data for name, (_, data) in fake.engines[0]._weights.items()} == bytes_of("first.onnx")


def test_a_failed_refit_ends_the_engines_use(fake: Any) -> None:
    from loracc.runtime.trt_deployment import TrtDeployment

    deployment = TrtDeployment("base.engine")
    fake.fail_next = True
    with pytest.raises(UnsupportedError, match="mixture") as failed:
        deployment.switch("first")
    assert "the library says why" in failed.value.message
    with pytest.raises(UnsupportedError, match="mixture"):
        deployment.switch("second")


def test_an_adapter_that_cannot_be_refitted_is_refused_before_anything_is_sent(fake: Any) -> None:
    from loracc.runtime.trt_deployment import TrtDeployment

    plan = Path("base.engine").read_bytes()
    write_engine(plan, "adapter", ("one.weight", "two.weight"))
    deployment = TrtDeployment("base.engine")
    deployment.switch("first")
    with pytest.raises(UnsupportedError, match=r"cannot be refitted: three\.weight"):
        deployment.switch("second")
    assert len(fake.sent) == 1
    deployment.restore()
    assert {name: data for name, (_, data) in fake.engines[0]._weights.items()} == bytes_of("base.onnx")


def test_the_command_writes_an_engine_and_names_both_comparisons(fake: Any, capsys: Any) -> None:
    from tests.fake_engine import weights_of

    assert run(["refit-trt", "base.engine", "--adapter", "first", "-o", "out.engine", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["against"] for row in result["comparisons"]] == ["refittable base", "plain base"]
    assert all(row["verdict"] == "skipped" and row["reason"] for row in result["comparisons"])
    assert all(row["numbers"]["verdict"] == "skipped" and row["numbers"]["reason"] for row in result["comparisons"])
    assert weights_of(Path("out.engine").read_bytes()) == bytes_of("first.onnx")
    assert run(["verify", "base.engine", "out.engine"]) in (0, 1)  # the manifest is read: it describes the new plan


class OnTheFake:
    """Runs a fake engine as the three layers that its weights are."""

    def __init__(self, loaded: Any) -> None:
        self._weights = loaded.engine._weights

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        h = inputs["h0"]
        for name in NAMES:
            h = h @ np.frombuffer(self._weights[name][1], np.float32).reshape(N, N)
        return {"h3": h}


def test_numbers_are_compared_with_both_bases(fake: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain base of other numbers than the refittable one's: each is beside its own."""
    from loracc.runners import tensorrt as runners_trt
    from tests.fake_engine import plan_of, weights_of

    monkeypatch.setattr(runners_trt, "EngineRunner", OnTheFake)
    command = ["refit-trt", "base.engine", "--adapter", "first", "-o", "out.engine", "--plain", "plain.engine"]

    def rows(data: dict[str, bytes]) -> dict[str, Any]:
        write_engine(plan_of({name: ("FLOAT", one) for name, one in data.items()}), "none", name="plain.engine")
        assert run([*command, "--json", "--force"]) == 0
        assert weights_of(Path("out.engine").read_bytes()) == bytes_of("first.onnx")  # not what was run last
        return {row["against"]: row["numbers"] for row in json.loads(capsys.readouterr().out)["comparisons"]}

    nearly = bytes_of("base.onnx")
    nearly["one.weight"] = (np.frombuffer(nearly["one.weight"], np.float32) * np.float32(1.0001)).tobytes()
    found = rows(nearly)
    assert found["refittable base"]["verdict"] == "pass" and found["refittable base"]["restored_error"] == 0
    assert found["plain base"]["verdict"] == "pass" and 5e-5 < found["plain base"]["restored_error"] < 2e-4
    assert all(numbers["effect"] > 0.01 for numbers in found.values())
    found = rows(bytes_of("first.onnx"))  # no engine of the base: it is nearer to the adapter
    assert found["refittable base"]["verdict"] == "pass" and found["plain base"]["verdict"] == "fail"
    Path("plain.engine").unlink()
    assert run([*command, "--force"]) == 2 and "plain.engine: no such file" in capsys.readouterr().err


def test_the_fake_is_strict(fake: Any) -> None:
    from tests.fake_engine import real
    from tests.strict_fake import Strict

    refitter = fake.Refitter(fake.Runtime(_logger(fake)).deserialize_cuda_engine(b"{}"), _logger(fake))
    with pytest.raises(AssertionError, match="does not take"):
        refitter.set_named_weights("one.weight")
    with pytest.raises(AssertionError, match="does not take"):
        refitter.set_named_weights("one.weight", b"no Weights")
    with pytest.raises(AssertionError, match="has no refit"):

        class Wrong(Strict, real=real.Refitter):
            def refit(self) -> bool:
                return True


def _logger(module: Any) -> Any:
    return type("ILogger", (), {"module": module})()


@pytest.mark.skipif(gpu_name() is not None, reason="there is a GPU")
def test_refusals_without_a_gpu(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = ["--profile", f"h0:1x{N}:2x{N}:4x{N}"]
    assert run(["build-trt", "base.onnx", "-o", "base.engine", "--flavor", "rtx", "--quiet", *profile]) == 0
    manifest = json.loads(Path("base.engine.json").read_text())

    def refused(*arguments: str) -> str:
        assert run(["refit-trt", "base.engine", "--adapter", "first", "-o", "out.engine", *arguments]) == 2
        assert not list(here.glob("*out*"))
        return capsys.readouterr().err

    assert "not built refittable" in refused()
    manifest["options"]["refittable"] = "all"
    Path("base.engine.json").write_text(json.dumps(manifest))
    assert "a GPU is needed to refit a TensorRT engine" in refused()
    assert "not the one that base.engine was built with" in refused("--base", "first.onnx")
    Path("base.onnx").rename("moved.onnx")
    assert "--base" in refused()


def test_the_base_is_checked(fake: Any) -> None:
    from loracc.runtime.trt_deployment import TrtDeployment

    with pytest.raises(InputError, match="not the one"):
        TrtDeployment("base.engine", "second.onnx")
