"""``fold --calibrate`` into quantized weights: less error on unseen inputs, provable, and never worse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import loracc
from loracc.cli import run
from tests.calibrating import inputs, write_adapter, write_data, write_model
from tests.quantizing import SCHEMES, VOCABULARY, changed, decoded, quantized, tensors
from tests.quantizing import adapter as token_adapter

#: Block of scales along the inputs, symmetric and not; scales of one and two bytes a code.
NBITS = ["4 bit", "4 bit, zero points", "8 bit", "float zero points", "QDQ int4 blocked", "QDQ uint4 blocked"]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


def base(folder: Path, scheme: str = "4 bit, zero points") -> Path:
    """Two quantized layers whose inputs are correlated."""
    SCHEMES[scheme](write_model(folder / "float.onnx", gemm=False), folder / "base.onnx")
    return folder / "base.onnx"


def result(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0], np.float64)


def truth(path: Path, lora: Path, x: np.ndarray) -> np.ndarray:
    """The decoded weights with their deltas, in float64."""
    from safetensors.numpy import load_file

    factors = load_file(lora / "adapter_model.safetensors")
    one, two = (
        decoded(path, name).astype(np.float64)
        + (
            factors[f"base_model.model.{name}.lora_B.weight"].astype(np.float64)
            @ factors[f"base_model.model.{name}.lora_A.weight"]
        ).T
        for name in ("one", "two")
    )
    answer: np.ndarray = np.maximum(x.astype(np.float64) @ one, 0) @ two
    return answer


@pytest.mark.parametrize("scheme", NBITS)
def test_unseen_inputs_have_less_error_than_with_nearest(
    tmp_path: Path, lora: Path, data: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, nearest, chosen = base(tmp_path, scheme), tmp_path / "nearest.onnx", tmp_path / "chosen.onnx"
    loracc.fold(model, [lora], nearest)
    assert run(["fold", str(model), str(lora), "-o", str(chosen), "--calibrate", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verification"]["verdict"] == "pass"
    for row in found["sites"]:
        assert row["gain"]["used"] and row["gain"]["calibrated"] < row["gain"]["nearest"]
        assert abs(row["survived"] - 1) < 0.01
    x = inputs(500, seed=77)
    exact = truth(model, lora, x)
    errors = [float(np.linalg.norm(result(path, {"x": x}) - exact)) for path in (nearest, chosen)]
    assert errors[1] < 0.6 * errors[0]
    assert found["calibration"]["calibrated"] < 0.6 * found["calibration"]["nearest"]
    changed(model, chosen)  # nodes, names, shapes and types are the base's
    assert run(["verify", str(model), str(chosen), "--adapter", str(lora), "--quiet"]) == 0
    assert run(["verify", str(chosen), "--search", str(tmp_path), "--quiet"]) == 0  # the output's record says how


@pytest.mark.parametrize("scheme", ["QDQ int8", "QDQ int8 per channel", "QDQ uint8", "QDQ reduced range"])
def test_integers_with_a_scale_for_a_tensor_or_channel(tmp_path: Path, scheme: str) -> None:
    """Codes of activations stand before the products."""
    model, lora = quantized(tmp_path, scheme), token_adapter(tmp_path / "adapter")
    made = loracc.fold(model, [lora], tmp_path / "out.onnx", calibrate=write_tokens(tmp_path / "data.npz"))
    assert made.verification is not None and made.verification.verdict == "pass"
    assert made.calibration is not None and made.calibration["calibrated"] < 0.8 * made.calibration["nearest"]
    assert loracc.verify(model, tmp_path / "out.onnx", [lora]).verdict == "pass"


@pytest.mark.parametrize("scheme", ["QDQ int8", "QDQ int8 per channel"])
def test_a_bias_in_integers_follows_the_scale_that_was_chosen(tmp_path: Path, scheme: str) -> None:
    """The runtime's optimizer adds the bias's codes to sums of products of codes. (The outputs are codes, too: their
    own rounding is most of the model's error, so its gain is small.)"""
    model, lora, out = quantized(tmp_path, scheme, gemm=True), token_adapter(tmp_path / "adapter"), tmp_path / "o.onnx"
    made = loracc.fold(model, [lora], out, calibrate=write_tokens(tmp_path / "data.npz"))
    assert {row["name"] for row in made.sites if row["gain"]["used"]} == {"fc.weight", "out.weight"}
    assert "out.bias_quantized_scale" in changed(model, out)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    ids = np.arange(VOCABULARY)
    np.testing.assert_allclose(result(out, {"ids": ids}), plain.run(None, {"ids": ids})[0], rtol=0, atol=1e-6)
    assert loracc.verify(model, out, [lora]).verdict == "pass"


def write_tokens(path: Path) -> Path:
    np.savez(path, ids=np.random.default_rng(0).integers(0, VOCABULARY, 320))
    return path


def test_from_the_original_weights(tmp_path: Path, lora: Path, data: Path) -> None:
    """``--base``: a delta that the codes are too coarse for is there all the same."""
    model, weak = base(tmp_path, "4 bit"), f"{lora}@0.05"
    original = tmp_path / "float.onnx"
    made = loracc.fold(model, [weak], tmp_path / "out.onnx", calibrate=data, original=original)
    assert made.calibration is not None and made.calibration["calibrated"] < 0.6 * made.calibration["nearest"]
    assert all(abs(row["survived"] - 1) < 0.01 for row in made.sites)
    assert loracc.verify(model, tmp_path / "out.onnx", [weak], original=original).verdict == "pass"
    assert loracc.verify(model, tmp_path / "out.onnx", [weak]).verdict == "fail"


@pytest.mark.parametrize("dtype", ["codes", "bf16"])
def test_verify_says_what_nearest_would_have_lost(
    tmp_path: Path, lora: Path, data: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the inputs that it is given; and only of an output whose rounding was chosen."""
    model, out, nearest = base(tmp_path), tmp_path / "out.onnx", tmp_path / "nearest.onnx"
    model, to = (model, None) if dtype == "codes" else (tmp_path / "float.onnx", dtype)
    loracc.fold(model, [lora], out, calibrate=data, dtype=to)
    loracc.fold(model, [lora], nearest, dtype=to)
    np.savez(tmp_path / "unseen.npz", x=inputs(500, seed=77))
    found = []
    for path in (out, nearest):
        call = ["verify", str(model), str(path), "--adapter", str(lora), "--inputs", str(tmp_path / "unseen.npz")]
        assert run([*call, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["numbers"]["end_to_end"])
    said, other = found
    # In bfloat16 the activations are rounded, too.
    share = 0.6 if dtype == "codes" else 0.9
    assert said["rounding"]["calibrated"] < share * said["rounding"]["nearest"] and not other["rounding"]
    assert said["rounding"]["calibrated"] == pytest.approx(said["outputs"][0]["relative_l2"])
    assert said["rounding"]["nearest"] == pytest.approx(other["outputs"][0]["relative_l2"], rel=1e-3)
    assert run([*call[:2], str(out), *call[3:]]) == 0
    assert "calibrated rounding: error of the outputs on the inputs that were given" in capsys.readouterr().out


def test_codes_that_a_quantizer_leaves_out_stay_out(tmp_path: Path) -> None:
    """Seven bits, so that products do not saturate: none is chosen that rounding to nearest would not take."""
    model, lora = quantized(tmp_path, "QDQ reduced range"), token_adapter(tmp_path / "adapter")
    made = loracc.fold(model, [lora], tmp_path / "o.onnx", calibrate=write_tokens(tmp_path / "data.npz"))
    loracc.fold(model, [lora], tmp_path / "nearest.onnx")
    assert all(row["gain"]["used"] for row in made.sites)
    for name in ("fc.weight_quantized", "out.weight_quantized"):
        ours, nearest = (tensors(tmp_path / f"{x}.onnx")[name].astype(int) for x in ("o", "nearest"))
        assert ours.max() <= max(64, nearest.max()) and ours.min() >= min(-64, nearest.min())


def put(path: Path, name: str, values: np.ndarray) -> None:
    """Replace an initializer."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


def code_is_far(path: Path, _base: Path) -> None:
    codes = tensors(path)["one.weight_Q4"].copy()
    codes[3, 1, 2] ^= 0x08
    put(path, "one.weight_Q4", codes)


def scale_is_large(path: Path, _base: Path) -> None:
    scales = tensors(path)["one.weight_scales"].copy()
    scales.flat[5] *= 1.3
    put(path, "one.weight_scales", scales)


def site_is_missing(path: Path, base: Path) -> None:
    for name, values in tensors(base).items():
        if name.startswith("two.weight"):
            put(path, name, values)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (code_is_far, "one.weight: a code is"),
        (scale_is_large, "neither the base nor the rule has"),
        (site_is_missing, "two.weight: .*of its strength"),
    ],
)
def test_faults_fail_on_a_calibrated_output(
    tmp_path: Path, lora: Path, data: Path, fault: Callable[[Path, Path], None], says: str
) -> None:
    model, out = base(tmp_path), tmp_path / "out.onnx"
    loracc.fold(model, [lora], out, calibrate=data)
    fault(out, model)
    verdict = loracc.verify(model, out, [lora])
    assert verdict.numbers.weights.verdict == "fail"
    assert re.search(says, verdict.numbers.weights.reason)


def test_another_strength_and_another_adapter_fail(tmp_path: Path, lora: Path, data: Path) -> None:
    model, out = base(tmp_path), tmp_path / "out.onnx"
    loracc.fold(model, [f"{lora}@1.02"], out, calibrate=data)
    assert loracc.verify(model, out, [f"{lora}@1.02"]).verdict == "pass"
    for wrong in (lora, write_adapter(tmp_path / "other", seed=9)):
        verdict = loracc.verify(model, out, [wrong])
        assert verdict.numbers.weights.verdict == "fail" and "of its strength" in verdict.numbers.weights.reason


def test_blocks_without_a_change_keep_their_bytes(tmp_path: Path, data: Path) -> None:
    """A delta on some inputs only; and a verification that sees when such a block changed."""
    from safetensors.numpy import load_file, save_file

    model, out, lora = base(tmp_path), tmp_path / "out.onnx", write_adapter(tmp_path / "part")
    factors = load_file(lora / "adapter_model.safetensors")
    factors["base_model.model.one.lora_A.weight"][:, 16:] = 0
    save_file(factors, lora / "adapter_model.safetensors")
    made = loracc.fold(model, [lora], out, calibrate=data)
    assert all(row["gain"]["used"] for row in made.sites)
    before, after = decoded(model, "one"), decoded(out, "one")
    assert np.array_equal(before[16:], after[16:]) and not np.array_equal(before[:16], after[:16])
    codes = tensors(out)["one.weight_Q4"].copy()
    codes[0, 2, 0] ^= 0x01
    put(out, "one.weight_Q4", codes)
    verdict = loracc.verify(model, out, [lora])
    assert verdict.verdict == "fail" and "that no delta changes" in verdict.reason


def test_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, lora: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(tmp_path)
    found: list[bytes] = []
    for workers in (1, 2):
        monkeypatch.setattr("loracc.calibration.calibrate.default_workers", lambda workers=workers: workers)
        out = tmp_path / f"out{workers}.onnx"
        loracc.fold(model, [lora], out, calibrate=data, verify=False)
        found.append(out.read_bytes())
    assert found[0] == found[1]


def test_what_does_not_help_is_given_up(tmp_path: Path, lora: Path) -> None:
    """Held-out inputs in other directions than those that were fitted: nearest's bytes."""
    rng = np.random.default_rng(0)
    fitted, unseen = rng.standard_normal((2, 4, 48))
    rows = [fitted if batch % 4 < 3 else unseen for batch in range(8)]
    x = np.concatenate([rng.standard_normal((8, 4)) @ directions for directions in rows]).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    model = base(tmp_path)
    loracc.fold(model, [lora], tmp_path / "nearest.onnx")
    made = loracc.fold(model, [lora], tmp_path / "out.onnx", calibrate=tmp_path / "data.npz")
    assert not any("gain" in row for row in made.sites)
    assert changed(tmp_path / "nearest.onnx", tmp_path / "out.onnx") == set()
    assert made.verification is not None and made.verification.verdict == "pass"
