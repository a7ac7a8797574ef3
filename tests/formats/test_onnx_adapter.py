"""``.onnx_adapter`` files written by ONNX Runtime's own ``AdapterFormat``, folded, and run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError
from loracc.formats import is_adapter, load_adapter
from loracc.formats.onnx_adapter_file import read_parameters, write_parameters
from loracc.manifest import parameter_name
from tests.formats.folding import folded_state

N_IN, N_OUT, RANK = 6, 10, 2


def factors(dtype: type = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "fc.lora_A.weight": rng.standard_normal((N_IN, RANK)).astype(dtype),
        "fc.lora_B.weight": rng.standard_normal((RANK, N_OUT)).astype(dtype),
    }


def by_onnxruntime(path: Path, parameters: dict[str, Array]) -> Path:
    adapter = ort.AdapterFormat()
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in parameters.items()})
    adapter.export_adapter(str(path))
    return path


def switchable(weight: Array) -> bytes:
    """y = xW + (xA)B with A and B as overridable initializers of rank 0, as Olive exports it."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["base"]),
            helper.make_node("MatMul", ["x", "fc.lora_A.weight"], ["down"]),
            helper.make_node("MatMul", ["down", "fc.lora_B.weight"], ["up"]),
            helper.make_node("Add", ["base", "up"], ["y"]),
        ],
        "switchable",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", N_IN]),
            helper.make_tensor_value_info("fc.lora_A.weight", TensorProto.FLOAT, [N_IN, "r"]),
            helper.make_tensor_value_info("fc.lora_B.weight", TensorProto.FLOAT, ["r", N_OUT]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N_OUT])],
        [
            numpy_helper.from_array(weight, "W"),
            numpy_helper.from_array(np.zeros((N_IN, 0), np.float32), "fc.lora_A.weight"),
            numpy_helper.from_array(np.zeros((0, N_OUT), np.float32), "fc.lora_B.weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_folded_as_onnxruntime_computes_it_with_the_adapter_active(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = by_onnxruntime(tmp_path / "a.onnx_adapter", factors())
    weight = np.random.default_rng(1).standard_normal((N_OUT, N_IN)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # ONNX Runtime warns about each overridable initializer
    session = ort.InferenceSession(switchable(weight.T.copy()), options, providers=["CPUExecutionProvider"])
    active = ort.LoraAdapter()
    active.Load(str(path))
    run = ort.RunOptions()
    run.add_active_adapter(active)
    x = np.random.default_rng(2).standard_normal((3, N_IN)).astype(np.float32)
    expected, before = session.run(None, {"x": x}, run)[0], session.run(None, {"x": x})[0]
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    after = folded_state(tmp_path / "base.safetensors", path)["fc.weight"].numpy()
    assert np.abs(before - expected).max() > 0.1
    np.testing.assert_allclose(x @ after.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_written_and_read_back_to_the_bit_and_always_the_same_bytes(tmp_path: Path, dtype: type) -> None:
    parameters = factors(dtype)
    one, two = tmp_path / "1.onnx_adapter", tmp_path / "2.onnx_adapter"
    write_parameters(one, parameters)
    write_parameters(two, dict(reversed(parameters.items())))
    assert one.read_bytes() == two.read_bytes()
    back = read_parameters(one)
    assert list(back) == sorted(parameters)
    for name, array in parameters.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    assert is_adapter(one)
    assert parameter_name("fc", "A") in back


def test_arrays_that_nobody_else_holds_are_written_whole(tmp_path: Path) -> None:
    """ONNX Runtime's ``set_parameters`` forgets whose memory it writes: large transposed arrays showed it."""
    rng = np.random.default_rng(0)
    arrays = {f"m{i}.lora_A.weight": rng.standard_normal((8, 5000)).astype(np.float32).T for i in range(40)}
    write_parameters(tmp_path / "a.onnx_adapter", arrays)
    back = read_parameters(tmp_path / "a.onnx_adapter")
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_onnxruntime_genais_names(tmp_path: Path) -> None:
    stem = "model.layers.0.attn.q_proj"
    tensors = {f"{stem}.lora_{k[8]}.MatMul.weight": array for k, array in factors().items()}
    adapter = load_adapter(by_onnxruntime(tmp_path / "a.onnx_adapter", tensors))
    assert adapter.entries[0].module == stem
    assert adapter.naming is not None
    assert adapter.naming("model.layers.0.self_attn.q_proj") == stem


def test_a_scale_is_taken_out_of_b_where_that_is_exact(tmp_path: Path) -> None:
    path = by_onnxruntime(tmp_path / "a.onnx_adapter", factors())
    plain, unfolded = (load_adapter(path, alpha=alpha).entries[0].delta for alpha in (None, 8.0))
    assert isinstance(plain, LowRank) and isinstance(unfolded, LowRank)
    assert (plain.scale, unfolded.scale) == (1.0, 4.0)
    np.testing.assert_array_equal(unfolded.b * np.float32(4), plain.b)
    with pytest.raises(InputError, match="without rounding"):
        load_adapter(path, alpha=7.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.lora_B.weight": np.ones((3, N_OUT), np.float32)}, "no pair"),
        ({"x": np.ones(3, np.float32)}, "'?x'?"),
        ({"fc.lora_A.quant.weight": np.ones(3, np.float32)}, "quantised"),
        ({"other.lora_A.weight": np.ones((2, 2), np.float32)}, "pairs"),
    ],
)
def test_wrong_files(tmp_path: Path, change: dict[str, Array], message: str) -> None:
    with pytest.raises(LoraccError, match=message):
        load_adapter(by_onnxruntime(tmp_path / "a.onnx_adapter", factors() | change))


@pytest.mark.parametrize("cut", [8, 20, 100])
def test_a_truncated_file_is_a_users_error(tmp_path: Path, cut: int) -> None:
    path = by_onnxruntime(tmp_path / "a.onnx_adapter", factors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a\.onnx_adapter"):
        load_adapter(path)


def test_the_graph_of_this_test_is_sound() -> None:
    onnx.checker.check_model(onnx.load_from_string(switchable(np.zeros((N_IN, N_OUT), np.float32))))
