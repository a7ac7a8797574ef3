"""The .onnx target: inside or beside, streamed, reproducible, and a graph that ONNX Runtime computes with."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, NumericsError, UnsupportedError
from loracc.folded import Binding, FoldedTensor
from loracc.model import LoadOptions
from loracc.sites import TRANSPOSED, Site
from loracc.sources.onnx_model import load_onnx
from loracc.staging import Staging
from loracc.targets import onnx_file
from loracc.targets.onnx_file import plan_onnx, stamp, write_onnx
from loracc.tensors import PermutedTensor, file_tensor

SIZE = 256


def delta() -> LowRank:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((4, SIZE)).astype(np.float32)
    return LowRank(a, rng.standard_normal((SIZE, 4)).astype(np.float32), 0.25)


def weights() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((SIZE, SIZE)).astype(np.float32), rng.standard_normal((SIZE, SIZE)).astype(np.float32)


def model(folder: Path) -> ir.Model:
    """y = (x·V)·Wᵀ + b: V is plain external data; W lies as [out, in], and is turned and folded on the way."""
    w, v = weights()
    bias = np.arange(SIZE, dtype=np.float32)
    (folder / "base.bin").write_bytes(w.tobytes() + v.tobytes() + bias[:4].tobytes())
    stored = file_tensor(folder / "base.bin", 0, w.nbytes, ir.DataType.FLOAT, w.shape, "w")
    plain = file_tensor(folder / "base.bin", w.nbytes, v.nbytes, ir.DataType.FLOAT, v.shape, "v")
    small = file_tensor(folder / "base.bin", 2 * w.nbytes, 16, ir.DataType.FLOAT, (4,), "small")
    site = Site("m", "weight", "linear", "w", TRANSPOSED)
    folded = FoldedTensor(PermutedTensor(stored, (1, 0)), [Binding(site, delta(), "a", "m.weight", "name")])
    tensors = {"v": plain, "w": folded, "b": ir.tensor(bias, name="b"), "small": small}
    values = {
        name: ir.Value(name=name, shape=ir.Shape(t.shape.numpy()), type=ir.TensorType(t.dtype), const_value=t)
        for name, t in tensors.items()
    }
    x = ir.Value(name="x", shape=ir.Shape(["batch", SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.node("MatMul", [x, values["v"]])
    second = ir.node("MatMul", [first.outputs[0], values["w"]])
    last = ir.node("Add", [second.outputs[0], values["b"]])
    last.outputs[0].name = "y"
    last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    last.outputs[0].shape = ir.Shape(["batch", SIZE])
    graph = ir.Graph(
        [x],
        [last.outputs[0]],
        nodes=[first, second, last],
        initializers=list(values.values()),
        opset_imports={"": 18},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def expected(x: Array) -> Array:
    w, v = weights()
    d = delta()
    folded = w.astype(np.float64) + 0.25 * (d.b.astype(np.float64) @ d.a)
    return x.astype(np.float64) @ v @ folded.T + np.arange(SIZE)


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("external", ["inline", "data", "auto"])
def test_onnxruntime_computes_the_folded_model(tmp_path: Path, external: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_onnx(model(tmp_path), out / "m.onnx", external=external)
    assert sorted(path.name for path in out.iterdir()) == (
        ["m.onnx", "m.onnx.data"] if external == "data" else ["m.onnx"]
    )
    onnx.checker.check_model(str(out / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(out / "m.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((3, SIZE)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(x), rtol=2e-5, atol=2e-3)


def test_small_tensors_stay_inside_and_large_ones_are_aligned(tmp_path: Path) -> None:
    write_onnx(model(tmp_path), tmp_path / "m.onnx", external="data")
    proto = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    found = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    page = SIZE * SIZE * 4
    assert found["v"] == {"location": "m.onnx.data", "offset": "0", "length": str(page)}
    assert found["w"] == {"location": "m.onnx.data", "offset": str(page), "length": str(page)}
    assert found["b"] == {"location": "m.onnx.data", "offset": str(2 * page), "length": "1024"}
    assert found["small"] == {}  # came from a file, and is inside now
    assert (tmp_path / "m.onnx.data").stat().st_size == 2 * page + 1024


@pytest.mark.parametrize("external", ["inline", "data"])
def test_the_same_bytes_twice_and_the_model_is_left_alone(tmp_path: Path, external: str) -> None:
    base = model(tmp_path)
    before = {value: value.const_value for value in base.graph.initializers.values()}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_onnx(base, tmp_path / name / "m.onnx", external=external, workers=1 if name == "one" else 3)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert {value: value.const_value for value in base.graph.initializers.values()} == before


def test_staged_files_refer_to_their_final_name(tmp_path: Path) -> None:
    with Staging(tmp_path / "m.onnx", companions=["m.onnx.data"]) as stage:
        write_onnx(model(tmp_path), stage.path, external="data")
        onnxruntime.InferenceSession(str(stage.path), providers=["CPUExecutionProvider"])
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert stage.files == ["m.onnx.data", "m.onnx"]


def test_the_plan_knows_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_onnx(model(tmp_path), tmp_path / "m.onnx", external="data")
    assert plan.nbytes == 2 * SIZE * SIZE * 4 + 1024 + 16
    assert plan.folded == SIZE * SIZE * 4 + 1024
    assert not (tmp_path / "m.onnx").exists()
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", 1000)
    assert plan_onnx(model(tmp_path), tmp_path / "m.onnx").weights


def test_what_does_not_fit_into_one_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    big = ir.Value(name="big", const_value=file_tensor("absent", 0, 3 << 30, ir.DataType.UINT8, (3 << 30,), "big"))
    graph = ir.Graph([], [], nodes=[], initializers=[big], opset_imports={"": 18}, name="g")
    with pytest.raises(InputError, match="2 GiB"):
        plan_onnx(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external="inline")


def test_a_reference_in_an_attribute_is_refused(tmp_path: Path) -> None:
    tensor = file_tensor(tmp_path / "x", 0, 16, ir.DataType.FLOAT, (4,), "c")
    node = ir.node("Constant", [], {"value": tensor})
    graph = ir.Graph([], [], nodes=[node], opset_imports={"": 18}, name="g")
    with pytest.raises(UnsupportedError, match="attribute 'value' lies in the file"):
        write_onnx(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")


def test_stamps_are_sorted_and_kept(tmp_path: Path) -> None:
    base = model(tmp_path)
    stamp(base, {"version": "1", "adapter": "sha256:0"})
    write_onnx(base, tmp_path / "m.onnx")
    proto = onnx.load(str(tmp_path / "m.onnx"))
    assert [(p.key, p.value) for p in proto.metadata_props] == [("loracc.adapter", "sha256:0"), ("loracc.version", "1")]
    assert (proto.producer_name, proto.producer_version) == ("loracc", "")


def linked_base(folder: Path) -> tuple[Path, ir.Model]:
    """A base model on disk and the same with one weight folded, its other weights still in the base's data file."""
    folder.mkdir()
    write_onnx(model(folder), folder / "base.onnx", external="data")
    loaded = load_onnx(folder / "base.onnx", LoadOptions()).ir
    value = loaded.graph.initializers["w"]
    assert value.const_value is not None
    site = Site("m", "weight", "linear", "w", TRANSPOSED)
    value.const_value = FoldedTensor(value.const_value, [Binding(site, delta(), "a", "m.weight", "name")])
    return folder / "base.onnx", loaded


def test_a_linked_variant_costs_its_changed_bytes(tmp_path: Path) -> None:
    base, variant = linked_base(tmp_path / "models")
    data = base.with_name("base.onnx.data")
    before = data.read_bytes()
    out = base.with_name("variant.onnx")
    with Staging(out, companions=["variant.onnx.data"]) as stage:
        plan = plan_onnx(variant, stage.path, external="link", home=out.parent)
        plan.write()
        onnxruntime.InferenceSession(str(stage.path), providers=["CPUExecutionProvider"])  # can be verified there
    assert stage.files == ["variant.onnx.data", "variant.onnx"]
    assert out.with_name("variant.onnx.data").stat().st_size == SIZE * SIZE * 4
    assert data.read_bytes() == before
    assert data.stat().st_nlink == 1
    onnx.load(str(base))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((3, SIZE)).astype(np.float32)
    w, v = weights()
    d = delta()
    twice = w.astype(np.float64) + 0.5 * (d.b.astype(np.float64) @ d.a)
    exact = x.astype(np.float64) @ v @ twice.T + np.arange(SIZE)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], exact, rtol=2e-5, atol=2e-3)
    onnx.checker.check_model(str(out), full_check=True)


def test_a_link_must_lie_in_the_folder_of_the_base(tmp_path: Path) -> None:
    _, variant = linked_base(tmp_path / "models")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="nothing can be linked"):
        plan_onnx(variant, tmp_path / "other" / "variant.onnx", external="link")
    # from above it works
    with Staging(tmp_path / "variant.onnx") as stage:
        plan_onnx(variant, stage.path, external="link", home=tmp_path).write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "other", "variant.onnx", "variant.onnx.data"]
    onnxruntime.InferenceSession(str(tmp_path / "variant.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("external", ["inline", "data", "link"])
def test_the_file_that_the_base_is_read_from_is_not_overwritten(tmp_path: Path, external: str) -> None:
    base, _ = linked_base(tmp_path / "models")
    base.with_name("base.onnx.data").rename(base.with_name("out.onnx.data"))
    proto = onnx.load(str(base), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entry.value.replace("base.onnx.data", "out.onnx.data")
    base.write_bytes(proto.SerializeToString())
    loaded = load_onnx(base, LoadOptions()).ir
    with pytest.raises(InputError, match="weights are read from this file"):
        plan_onnx(loaded, base.with_name("out.onnx"), external=external)


@pytest.mark.parametrize("external", ["inline", "data"])
def test_what_a_fold_refuses_comes_out_as_it_was_raised(external: str, tmp_path: Path) -> None:
    """onnx_ir computes a tensor that lies inside while it serializes, and wraps what is raised there."""
    made = model(tmp_path)
    folded = made.graph.initializers["w"].const_value
    assert isinstance(folded, FoldedTensor)
    [binding] = folded.bindings
    too_much = replace(binding, delta=binding.delta.scaled(1e40))
    made.graph.initializers["w"].const_value = FoldedTensor(folded.base, [too_much])
    with pytest.raises(NumericsError, match=r"folding m.weight: the weight would hold inf or NaN"):
        write_onnx(made, tmp_path / "out.onnx", external=external)
