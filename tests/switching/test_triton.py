"""``attach --as triton``: configurations that Triton's own message reads, and models that ONNX Runtime runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tritonclient.grpc import model_config_pb2

from loracc.cli import run
from loracc.switching.triton_config import TritonSettings, model_config

N, R = 8, 2


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_base(*, across_rows: bool = False) -> None:
    """x [batch, time, N] and lengths [batch] -> y; with ``across_rows``, a row sees the others'."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "/fc/MatMul"),
        helper.make_node("Cast", ["lengths"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["f", "axes"], ["g"]),
        helper.make_node("Add", ["h", "g"], ["s"]),
    ]
    if across_rows:
        nodes.append(helper.make_node("ReduceMean", ["s", "zero"], ["m"], keepdims=1))
        nodes.append(helper.make_node("Sub", ["s", "m"], ["y"]))
    else:
        nodes.append(helper.make_node("Relu", ["s"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time", N]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", N])],
        [
            numpy_helper.from_array(rng.standard_normal((N, N)).astype(np.float32), "fc.weight"),
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "base.onnx")


def write_adapter(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Path(name).mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["fc"]}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.fc.lora_{side}.weight": rng.standard_normal((R, N) if side == "A" else (N, R))
        for side in "AB"
    }
    save_file({key: value.astype(np.float32) for key, value in factors.items()}, f"{name}/adapter_model.safetensors")


def config_of(entry: str) -> Any:
    return text_format.Parse(Path(entry, "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def attach(*arguments: str) -> int:
    return run(["attach", "base.onnx", "first", "second", "--as", "triton", "-o", "models", "--quiet", *arguments])


@pytest.fixture
def adapters(here: Path) -> None:
    write_adapter("first", 1)
    write_adapter("second", 2)


def test_every_entry_is_whole_and_its_configuration_says_what_the_model_is(adapters: None) -> None:
    write_base()
    assert attach("--max-batch", "16") == 0
    assert sorted(path.name for path in Path("models").iterdir()) == ["base", "first", "second"]
    x = np.random.default_rng(3).standard_normal((2, 5, N)).astype(np.float32)
    feeds = {"x": x, "lengths": np.array([1, 2], np.int64)}
    for entry in ("base", "first", "second"):
        config = config_of(f"models/{entry}")
        assert (config.name, config.backend, config.max_batch_size) == (entry, "onnxruntime", 16)
        assert config.HasField("dynamic_batching")
        x_port, lengths = config.input
        assert (x_port.name, x_port.data_type, list(x_port.dims)) == ("x", model_config_pb2.TYPE_FP32, [-1, N])
        assert (lengths.data_type, list(lengths.dims)) == (model_config_pb2.TYPE_INT64, [1])
        assert lengths.HasField("reshape") and list(lengths.reshape.shape) == []  # [batch], and no axis more
        assert [(port.name, list(port.dims)) for port in config.output] == [("y", [-1, N])]
        model = Path("models", entry, "1", config.default_model_filename)
        (found,) = onnxruntime.InferenceSession(str(model)).run(None, feeds)
        reference = "base.onnx" if entry == "base" else f"{entry}.onnx"
        if entry != "base":
            assert run(["fold", "base.onnx", entry, "-o", reference, "--quiet"]) == 0
        (expected,) = onnxruntime.InferenceSession(reference).run(None, feeds)
        np.testing.assert_array_equal(found, expected)
    assert attach() == 2 and attach("--force") == 0


def test_rows_that_depend_on_each_other_are_not_batched(adapters: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(across_rows=True)
    assert run(["attach", "base.onnx", "first", "--as", "triton", "-o", "models", "--json"]) == 0
    assert any("batches nothing" in note for note in json.loads(capsys.readouterr().out)["notes"])
    config = config_of("models/first")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert [list(port.dims) for port in config.input] == [[-1, -1, N], [-1]]


def test_names_and_types_survive_the_text_format() -> None:
    name = 'a "b"\\c\né'
    port = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BFLOAT16))
    graph = ir.Model(ir.Graph([port], [port], nodes=[], opset_imports={"": 18}), ir_version=10)
    text = model_config("m", graph, TritonSettings(), batched=False, made_of="x")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.input[0].name == name and config.input[0].data_type == model_config_pb2.TYPE_BF16
    assert list(config.input[0].dims) == [1] and list(config.input[0].reshape.shape) == []


@pytest.mark.rtx
def test_engines(adapters: None) -> None:
    """The plan is the same code's whichever flavour builds it; Triton itself takes the datacenter's only."""
    from loracc.binding import bind_each, read_adapters
    from loracc.formats import parse_adapter_spec
    from loracc.model import LoadOptions
    from loracc.sources import load_model
    from loracc.switching.triton_repository import write_repository

    write_base()
    base = load_model("base.onnx", LoadOptions())
    read = read_adapters([parse_adapter_spec("first")], {}, combine=None, density=None, rank=None, seed=0)
    (bound,) = bind_each(base, read, [], False)
    ranges = (f"x:1x1x{N}:2x4x{N}:4x8x{N}", "lengths:1:2:4")
    settings = TritonSettings("tensorrt", 4, profiles=ranges, flavor="rtx")
    write_repository(base, {"first": bound.bindings}, Path("models"), settings, described={})
    assert config_of("models/first").backend == "tensorrt"
    assert run(["verify", "models/base/1/model.plan", "models/first/1/model.plan", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "models.onnx"), "writes a folder"),
        (("-o", "models", "--profile", "x:1:1:1"), "--backend tensorrt"),
        (("-o", "models", "--data", "inline"), "every entry"),
        (("-o", "models", "--sum", "both=first+second"), "--sum"),
        (("-o", "models", "base=second"), "no name for a model"),
    ],
)
def test_wrong_calls(
    adapters: None, here: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base()
    assert run(["attach", "base.onnx", "first", "--as", "triton", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(here.glob("*models*"))
