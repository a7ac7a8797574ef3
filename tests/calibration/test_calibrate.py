"""``fold --calibrate``: less error in the outputs than rounding to nearest, provable, and never worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import loracc
from loracc.cli import run
from loracc.errors import InputError
from tests.calibrating import inputs, write_adapter, write_data, write_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.onnx")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


def weights(path: Path) -> dict[str, np.ndarray]:
    """In float64; files that loracc writes with external data are read too."""
    import ml_dtypes

    found = {}
    for tensor in onnx.load(path).graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.uint16:
            array = array.view(ml_dtypes.bfloat16)
        found[tensor.name] = array.astype(np.float64)
    return found


def outputs(values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The model in float64, whatever dtype its weights had."""
    result: np.ndarray = np.maximum(x.astype(np.float64) @ values["one.weight"], 0) @ values["two.weight"].T
    return result


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_unseen_inputs_have_less_error_than_with_nearest(
    base: Path, adapter: Path, data: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, nearest, chosen = (tmp_path / f"{name}.onnx" for name in ("exact", "nearest", "chosen"))
    loracc.fold(base, [adapter], exact)
    loracc.fold(base, [adapter], nearest, dtype=dtype)
    call = ["fold", str(base), str(adapter), "-o", str(chosen), "--dtype", dtype, "--calibrate", str(data), "--json"]
    assert run(call) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["verdict"] == "pass"
    x = inputs(500, seed=77)
    truth = outputs(weights(exact), x)
    errors = [float(np.linalg.norm(outputs(weights(path), x) - truth)) for path in (nearest, chosen)]
    assert errors[1] < 0.7 * errors[0]
    assert result["calibration"]["calibrated"] < 0.7 * result["calibration"]["nearest"]
    for row in result["sites"]:
        assert row["gain"]["used"] and row["gain"]["calibrated"] < row["gain"]["nearest"]

    # verify is told by the output's own record, also where it has to find the inputs itself
    assert run(["verify", str(base), str(chosen), "--adapter", str(adapter), "--quiet"]) == 0
    assert run(["verify", str(chosen), "--search", str(tmp_path), "--quiet"]) == 0


def _scaled(delta: np.ndarray) -> np.ndarray:
    return 1.02 * delta


def _skipped(delta: np.ndarray) -> np.ndarray:
    return 0 * delta


@pytest.mark.parametrize(("fault", "says"), [(_scaled, "the delta is there at 1.0"), (_skipped, "of its strength")])
def test_faults_fail_on_a_calibrated_output(
    base: Path, adapter: Path, data: Path, tmp_path: Path, fault: Callable[[Any], Any], says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out.onnx"
    loracc.fold(base, [adapter], out, dtype="fp16", calibrate=data)
    before, model = weights(base), onnx.load(out)
    tensor = next(t for t in model.graph.initializer if t.name == "two.weight")
    after = weights(out)["two.weight"]
    wrong = after + fault(after - before["two.weight"]) - (after - before["two.weight"])
    tensor.CopyFrom(numpy_helper.from_array(wrong.astype(np.float16), "two.weight"))
    onnx.save(model, out)
    assert run(["verify", str(base), str(out), "--adapter", str(adapter), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["numbers"]["verdict"] == "fail"
    assert "two.weight" in result["numbers"]["reason"] and says in result["numbers"]["reason"]


def test_another_weight_that_changed_fails(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    loracc.fold(base, [adapter], out, dtype="fp16", calibrate=data)
    model = onnx.load(out)
    tensor = next(t for t in model.graph.initializer if t.name == "one.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[3, 5] += np.float16(0.05)
    tensor.CopyFrom(numpy_helper.from_array(values, "one.weight"))
    onnx.save(model, out)
    verdict = loracc.verify(base, out, [adapter])
    assert verdict.numbers.verdict == "fail" and "further from" in verdict.numbers.weights.reason


def test_the_same_bytes_for_any_number_of_workers(
    base: Path, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bytes] = []
    for workers in (1, 2, 2):
        monkeypatch.setattr("loracc.calibration.calibrate.default_workers", lambda workers=workers: workers)
        out = tmp_path / f"out{len(found)}.onnx"
        loracc.fold(base, [adapter], out, dtype="bf16", calibrate=data, verify=False)
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]


def test_what_does_not_help_is_given_up(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Held-out inputs in other directions than those that were fitted: the rounding is to nearest, bit for bit."""
    rng = np.random.default_rng(0)
    fitted, unseen = rng.standard_normal((2, 4, 48))
    rows = [fitted if batch % 4 < 3 else unseen for batch in range(8)]
    data = tmp_path / "data.npz"
    # Batches of eight samples, and every fourth is held out.
    x = np.concatenate([rng.standard_normal((8, 4)) @ directions for directions in rows]).astype(np.float32)
    np.savez(data, x=x)
    nearest, chosen = tmp_path / "nearest.onnx", tmp_path / "chosen.onnx"
    loracc.fold(base, [adapter], nearest, dtype="bf16")
    result = loracc.fold(base, [adapter], chosen, dtype="bf16", calibrate=data)
    assert not any(row["gain"]["used"] for row in result.sites if "gain" in row)
    for name, values in weights(nearest).items():
        np.testing.assert_array_equal(weights(chosen)[name], values)
    # The record says no more than that: it is verified as strictly, and a neighbour of the nearest number fails.
    model = onnx.load(chosen)
    record = {entry.key: entry.value for entry in model.metadata_props}["loracc.provenance"]
    assert "calibrated" not in record
    tensor = next(t for t in model.graph.initializer if t.name == "one.weight")
    bits = np.frombuffer(tensor.raw_data, np.uint16).copy()
    bits[::2] ^= 1
    tensor.raw_data = bits.tobytes()
    onnx.save(model, chosen)
    assert run(["verify", str(base), str(chosen), "--adapter", str(adapter), "--quiet"]) == 1


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (None, {"dtype": "bf16"}, "no such file"),
        (lambda p: p.write_bytes(b""), {"dtype": "bf16"}, "no text"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), {"dtype": "bf16"}, "not UTF-8 text"),
        (lambda p: np.savez(p, y=np.zeros((8, 48))), {"dtype": "bf16"}, "no array for the model's inputs x"),
        (lambda p: np.savez(p, x=np.zeros((8, 3), np.float32)), {"dtype": "bf16"}, "do not fit the model"),
        (lambda p: np.savez(p, x=np.zeros((8, 48), np.float32)), {}, "FLOAT"),
        (lambda p: np.savez(p, x=np.zeros((3, 48), np.float32)), {"dtype": "bf16"}, "3 batches"),
        (lambda p: np.savez(p, x=np.full((8, 48), np.nan, np.float32)), {"dtype": "bf16"}, "inf or NaN"),
        (lambda p: p.write_text("a line\n"), {"dtype": "bf16"}, "no tokenizer"),
        (lambda p: p.write_text("a line\n"), {"dtype": "bf16", "rounding": "nearest"}, "mean nothing"),
    ],
)
def test_errors(
    base: Path, adapter: Path, tmp_path: Path, make: Callable[[Path], Any] | None, options: dict[str, Any], says: str
) -> None:
    file = tmp_path / "calibration.npz"
    if make is not None:
        make(file)
    with pytest.raises(InputError, match=says):
        loracc.fold(base, [adapter], tmp_path / "out.onnx", calibrate=file, **options)
    assert not (tmp_path / "out.onnx").exists()


def test_a_program_is_refused(base: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written as \.pt2"):
        loracc.fold(base, [adapter], tmp_path / "out.pt2", dtype="bf16", calibrate=data)


def test_no_room_is_said_before_anything_runs(
    base: Path, adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracc.calibration.room.available_memory", lambda: 1000)
    with pytest.raises(InputError, match="GB of memory for this model"):
        loracc.fold(base, [adapter], tmp_path / "out.onnx", dtype="bf16", calibrate=data)


def test_nothing_to_choose(tmp_path: Path) -> None:
    """An embedding alone: looked up, never multiplied."""
    from onnx import TensorProto, helper
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["emb.weight", "ids"], ["y"], "/emb/Gather")],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(rng.standard_normal((20, 8)).astype(np.float32), "emb.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "e.onnx")
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["emb"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = rng.standard_normal((2, 20)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
    names = (f"base_model.model.emb.lora_embedding_{x}" for x in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no weight with a delta is read by a product"):
        loracc.fold(tmp_path / "e.onnx", [folder], tmp_path / "o.onnx", dtype="bf16", rounding="calibrated")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_a_checkpoint_from_text(tmp_path: Path) -> None:
    """A folder's graph is traced for the sums, and its own tokenizer reads the text."""
    from tests.calibrating import write_tokenizer
    from tests.models import adapted, build, save_base

    model = build("bert", dtype="bfloat16")
    folder = save_base(model, tmp_path / "base")
    write_tokenizer(folder, words=90)
    adapted(model.float(), target_modules=["query", "dense"]).save_pretrained(tmp_path / "lora")
    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(0, 90, 12)) for _ in range(32)))
    out = tmp_path / "merged"
    result = loracc.fold(folder, [tmp_path / "lora"], out, calibrate=text)
    assert result.calibration and result.calibration["calibrated"] < result.calibration["nearest"]
    assert loracc.verify(folder, out, [tmp_path / "lora"]).verdict == "pass"
    single = tmp_path / "single.safetensors"
    loracc.fold(folder, [tmp_path / "lora"], single, calibrate=text)
    assert loracc.verify(folder, single, [tmp_path / "lora"]).verdict == "fail"  # it cannot say how it was rounded
    assert loracc.verify(folder, single, [tmp_path / "lora"], rounding="calibrated").verdict == "pass"


def test_what_is_nearest_throughout_may_lose_some_of_a_small_delta(tmp_path: Path) -> None:
    """W lies on the grid, and so a part of ΔW is always lost, in ΔW's own direction: no fault, whatever is asked."""
    import ml_dtypes

    base = write_model(tmp_path / "base.onnx")
    model = onnx.load(base)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, base)
    adapter = write_adapter(tmp_path / "weak", size=0.004)
    loracc.fold(base, [adapter], tmp_path / "out.onnx", dtype="bf16")
    for rounding in ("nearest", "calibrated"):
        verdict = loracc.verify(base, tmp_path / "out.onnx", [adapter], rounding=rounding)
        assert verdict.numbers.weights.verdict == "pass"
