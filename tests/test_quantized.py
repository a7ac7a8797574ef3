"""Adapters folded into quantized graphs: onnxruntime's own quantizers make them, its own kernels say what they mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from loracc import attach, fold, unfold, verify
from loracc.errors import CheckFailed, LoraccError, UnsupportedError
from loracc.inspection import inspect
from loracc.passes.encode_weights import encoded
from loracc.sources.onnx_model import read_graph
from loracc.targets.onnx_file import write_onnx
from tests.quantizing import SCHEMES, VOCABULARY, adapter, changed, decoded, dynamically_quantized, quantized, tensors


def change(folder: Path, name: str) -> np.ndarray:
    """ΔW in the graph's orientation, in float64."""
    arrays = load_file(folder / "adapter_model.safetensors")
    a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return (b @ a).T


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_mean_what_the_kernels_make_of_them(tmp_path: Path, scheme: str) -> None:
    path = quantized(tmp_path, scheme)
    weights = read_graph(path).graph.initializers
    for name in ("fc", "out"):
        tensor = weights[f"{name}.weight"].const_value
        assert tensor is not None
        np.testing.assert_allclose(tensor.numpy(), decoded(path, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_folded_is_the_same_file(tmp_path: Path, scheme: str) -> None:
    path = quantized(tmp_path, scheme)
    write_onnx(encoded(read_graph(path)), tmp_path / "out.onnx")
    assert changed(path, tmp_path / "out.onnx") == set()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fold(tmp_path: Path, scheme: str) -> None:
    """The written weight is W + ΔW to the nearest value of its grid, and nothing else changed."""
    path, out = quantized(tmp_path, scheme), tmp_path / "out.onnx"
    result = fold(path, [adapter(tmp_path / "adapter")], out)
    assert result.verification is not None and result.verification.verdict == "pass"
    names = changed(path, out)
    assert names and all(name.startswith(("fc.weight_", "out.weight_")) for name in names)
    for name in ("fc", "out"):
        before, after = decoded(path, name).astype(np.float64), decoded(out, name)
        wanted = before + change(tmp_path / "adapter", name)
        steps = max(array.max() for key, array in tensors(out).items() if key.startswith(name) and "scale" in key)
        # Of two bits, some blocks lose least with the scale they had, though it does not reach their extremes.
        assert np.abs(after - wanted).max() <= (1.5 if scheme == "2 bit" else 1.01) * abs(steps)
        assert np.linalg.norm(after - wanted) < 0.5 * np.linalg.norm(before - wanted) or scheme == "2 bit"
    assert all(0.6 < row["survived"] < 1.2 for row in result.sites)


def test_fold_twice_gives_the_same_bytes_and_verify_agrees(tmp_path: Path) -> None:
    path, lora = quantized(tmp_path, "4 bit, zero points"), adapter(tmp_path / "adapter")
    for name in ("one.onnx", "two.onnx"):
        fold(path, [lora], tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert verify(path, tmp_path / "one.onnx", [lora]).verdict == "pass"


@pytest.mark.parametrize("scheme", ["4 bit", "4 bit, zero points", "float zero points", "QDQ uint4 blocked"])
def test_blocks_without_a_change_keep_their_bytes(tmp_path: Path, scheme: str) -> None:
    path, out = quantized(tmp_path, scheme), tmp_path / "out.onnx"
    fold(path, [adapter(tmp_path / "adapter", inputs=slice(32, 64), names=["fc"])], out)
    before, after = decoded(path, "fc"), decoded(out, "fc")
    assert np.array_equal(before[:32], after[:32]) and np.array_equal(before[64:], after[64:])
    assert not np.array_equal(before[32:64], after[32:64])
    assert all(name.startswith("fc.") for name in changed(path, out))


def test_little_survives_and_is_said(tmp_path: Path) -> None:
    path = quantized(tmp_path, "2 bit")
    result = fold(path, [adapter(tmp_path / "adapter", scale=0.01)], tmp_path / "out.onnx")
    assert any("less than half of ΔW survived quantization" in note for note in result.notes)
    assert all(row["survived"] < 0.5 for row in result.sites)


def test_a_wrong_code_is_found(tmp_path: Path) -> None:
    path, lora, out = quantized(tmp_path, "4 bit"), adapter(tmp_path / "adapter"), tmp_path / "out.onnx"
    fold(path, [lora], out)
    model = onnx.load(out)
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.weight_Q4")
    array = numpy_helper.to_array(codes).copy()
    array[3, 1, 2] ^= 0x01
    codes.CopyFrom(numpy_helper.from_array(array, codes.name))
    onnx.save(model, out)
    result = verify(path, out, [lora])
    assert result.verdict == "fail" and "1 codes" in result.summary() and "fc.weight" in result.summary()


def test_a_base_that_was_not_folded_is_found(tmp_path: Path) -> None:
    path, lora = quantized(tmp_path, "4 bit"), adapter(tmp_path / "adapter")
    assert verify(path, path, [lora]).verdict == "fail"


def test_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot change its type"):
        fold(quantized(tmp_path, "4 bit"), [adapter(tmp_path / "adapter")], tmp_path / "out.onnx", dtype="fp16")
    assert not (tmp_path / "out.onnx").exists()


def test_integer_products_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoraccError, match=r"MatMulInteger .*multiplied as integers") as error:
        fold(dynamically_quantized(tmp_path), [adapter(tmp_path / "adapter")], tmp_path / "out.onnx")
    assert "MatMulNBits" in str(error.value.hint)


def damaged(path: Path, name: str, array: np.ndarray) -> Path:
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("fc.weight_Q4", np.zeros((96, 3, 8), np.uint8), "packed codes"),
        ("fc.weight_scales", np.ones((96, 2), np.float32), "scales"),
        ("fc.weight_zero_points", np.zeros((96, 1), np.uint8), "zero points"),
        ("fc.weight_scales", np.full((96, 5), np.inf, np.float32), "inf or NaN"),
    ],
)
def test_damaged_encodings(tmp_path: Path, name: str, array: np.ndarray, said: str) -> None:
    path = damaged(quantized(tmp_path, "4 bit, zero points"), name, array)
    with pytest.raises(LoraccError, match=said) as error:
        fold(path, [adapter(tmp_path / "adapter")], tmp_path / "out.onnx")
    assert "fc.weight" in str(error.value) and not isinstance(error.value, CheckFailed)
    assert not (tmp_path / "out.onnx").exists()


def test_scales_of_zero(tmp_path: Path) -> None:
    """Blocks of zeros whose scale is zero get one where a delta needs it."""
    path = quantized(tmp_path, "4 bit")
    damaged(path, "fc.weight_scales", np.zeros((96, 3), np.float32))
    result = fold(path, [adapter(tmp_path / "adapter", inputs=slice(0, 64))], tmp_path / "out.onnx", verify=True)
    assert result.verification is not None and result.verification.verdict == "pass"
    scales = tensors(tmp_path / "out.onnx")["fc.weight_scales"]
    assert (scales[:, :2] != 0).all() and (scales[:, 2] == 0).all()


def test_shared_scales_are_unshared(tmp_path: Path) -> None:
    """Two weights with one scale and zero point, of which one changes."""
    path, out = quantized(tmp_path, "QDQ uint8"), tmp_path / "out.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in ("out.weight_scale", "out.weight_zero_point"):
                node.input[index] = name.replace("out.", "fc.")
    onnx.save(model, path)
    result = fold(path, [adapter(tmp_path / "adapter", names=["fc"])], out)
    assert result.verification is not None and result.verification.verdict == "pass"
    assert np.array_equal(decoded(path, "out"), decoded(out, "out"))
    assert not np.array_equal(decoded(path, "fc"), decoded(out, "fc"))


def run(path: Path, *, optimize: bool) -> np.ndarray:
    level = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": np.arange(VOCABULARY)})[0])


@pytest.mark.parametrize("scheme", ["QDQ int8", "QDQ int8 per channel", "QDQ uint8"])
def test_a_bias_in_integers_follows_its_weight(tmp_path: Path, scheme: str) -> None:
    """The runtime adds the bias's codes to sums of products of codes, whatever scale the graph gives them."""
    path, out, lora = quantized(tmp_path, scheme, gemm=True), tmp_path / "out.onnx", adapter(tmp_path / "adapter")
    fold(path, [lora], out)
    assert {"out.bias_quantized", "out.bias_quantized_scale"} <= changed(path, out)
    np.testing.assert_allclose(run(out, optimize=True), run(out, optimize=False), rtol=0, atol=1e-6)
    before, after = (bias_of(path), bias_of(out))
    step = tensors(out)["out.bias_quantized_scale"].max()
    np.testing.assert_allclose(before, after, rtol=0, atol=1.01 * step)
    assert verify(path, out, [lora]).verdict == "pass"
    for name in ("out.bias_quantized", "out.bias_quantized_scale"):
        damaged(out, name, tensors(path)[name])
    result = verify(path, out, [lora])
    assert result.verdict == "fail" and "out.bias" in result.summary()


def bias_of(path: Path) -> np.ndarray:
    found = tensors(path)
    return found["out.bias_quantized"].astype(np.float64) * found["out.bias_quantized_scale"].astype(np.float64)


def test_inspect_shows_the_file_as_it_is(tmp_path: Path) -> None:
    found = inspect(quantized(tmp_path, "4 bit, zero points"))
    assert found["ops"] == {"MatMulNBits": 2, "Gather": 1, "Relu": 1}
    assert found["quantized"] == {"MatMulNBits 4 bit, blocks of 16 along axis 1, zero points": 2}
    assert [(site["name"], site["shape"]) for site in found["sites"]][1:] == [
        ("fc.weight", [96, 72]),
        ("out.weight", [50, 96]),
    ]
    (refused,) = inspect(dynamically_quantized(tmp_path))["cannot be folded into"][:1]
    assert "MatMulInteger" in refused


@pytest.mark.parametrize("scheme", ["4 bit, zero points", "float zero points"])
def test_attach_keeps_the_codes(tmp_path: Path, scheme: str) -> None:
    """Switchable deltas stand beside quantized weights and are not rounded to their grids; without one, the bits are
    those of the quantized base itself (the kernel's, which are not those of a product with the decoded weight)."""
    path, out = quantized(tmp_path, scheme), tmp_path / "switchable.onnx"
    result = attach(path, [f"one={adapter(tmp_path / 'adapter')}"], out)
    assert result.verification is not None and result.verification.verdict == "pass"
    before, after = tensors(path), tensors(out)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [node.op_type for node in onnx.load(out).graph.node].count("MatMulNBits") == 2


def test_unfold_gives_the_codes_back(tmp_path: Path) -> None:
    path, out = quantized(tmp_path, "4 bit"), tmp_path / "out.onnx"
    fold(path, [adapter(tmp_path / "adapter")], out)
    unfold(out, path, tmp_path / "back.onnx")  # by the record that the output carries
    assert changed(path, tmp_path / "back.onnx") == set()


@pytest.mark.parametrize(("strength", "said"), [(1e-4, True), (1.0, False)])
def test_a_tolerance_above_what_the_adapter_does_is_said(tmp_path: Path, strength: float, *, said: bool) -> None:
    path = quantized(tmp_path, "8 bit, zero points")
    result = fold(path, [f"{adapter(tmp_path / 'adapter')}@{strength}"], tmp_path / "out.onnx")
    assert result.verification is not None and result.verification.verdict == "pass"
    notes = result.verification.numbers.end_to_end.notes
    assert any("a lost adapter would not be seen" in note for note in notes) is said
