"""The merged checkpoint: the base's files again, byte for byte but for the folded numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loracc.deltas import LowRank
from loracc.errors import UnsupportedError
from loracc.folded import Binding, FoldedTensor
from loracc.model import BaseModel, LoadOptions
from loracc.sites import Site
from loracc.sources.checkpoint import load_checkpoint
from loracc.sources.safetensors_file import read_header
from loracc.targets.checkpoint import plan_checkpoint, safetensors_header, write_checkpoint

SHAPE = (48, 32)


def arrays(prefix: str) -> dict[str, Any]:
    rng = np.random.default_rng(len(prefix))
    return {
        f"{prefix}.q.weight": rng.standard_normal(SHAPE).astype(ml_dtypes.bfloat16),
        f"{prefix}.norm.weight": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        f"{prefix}.table": np.arange(3, dtype=np.int64),
    }


def folder(path: Path, *, sharded: bool) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", "hidden": 1}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"weights of another format")
    if not sharded:
        save_file(arrays("a") | arrays("bb"), path / "model.safetensors", metadata={"format": "pt", "by": "me"})
        return path
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map: dict[str, str] = {}
    for name, prefix in zip(names, ("a", "bb"), strict=True):
        save_file(arrays(prefix), path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays(prefix), name)
    index = {"metadata": {"total_size": 1, "total_parameters": 5}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path: Path) -> BaseModel:
    return load_checkpoint(path, LoadOptions(graph=False))


def fold(model: BaseModel, name: str, dtype: ir.DataType | None = None) -> None:
    value = model.ir.graph.initializers[name]
    assert value.const_value is not None
    rng = np.random.default_rng(5)
    a = rng.standard_normal((4, SHAPE[1])).astype(np.float32)
    delta = LowRank(a, rng.standard_normal((SHAPE[0], 4)).astype(np.float32), 0.5)
    site = Site(name.removesuffix(".weight"), "weight", "linear", name)
    bindings = [Binding(site, delta, "adapter", name, "name")] if name.endswith("q.weight") else []
    value.const_value = FoldedTensor(value.const_value, bindings, dtype)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("sharded", [False, True])
def test_an_untouched_checkpoint_is_copied_byte_for_byte(tmp_path: Path, sharded: bool) -> None:
    base = folder(tmp_path / "base", sharded=sharded)
    write_checkpoint(load(base), tmp_path / "out", folder=True)
    expected = contents(base)
    del expected["pytorch_model.bin"]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fold_changes_the_folded_tensor_and_no_other_byte(tmp_path: Path, sharded: bool) -> None:
    base = folder(tmp_path / "base", sharded=sharded)
    model = load(base)
    fold(model, "a.q.weight")
    write_checkpoint(model, tmp_path / "out", folder=True)
    before, after = contents(base), contents(tmp_path / "out")
    changed = {name for name in after if after[name] != before[name]}
    name = "model-00001-of-00002.safetensors" if sharded else "model.safetensors"
    assert changed == {name}
    info = read_header(base / name).by_name()["a.q.weight"]
    outside = [data[: info.offset] + data[info.offset + info.nbytes :] for data in (before[name], after[name])]
    assert outside[0] == outside[1]
    rng = np.random.default_rng(5)
    a = rng.standard_normal((4, SHAPE[1])).astype(np.float32)
    b = rng.standard_normal((SHAPE[0], 4)).astype(np.float32)
    exact = arrays("a")["a.q.weight"].astype(np.float64) + 0.5 * (b.astype(np.float64) @ a)
    result = load_file(tmp_path / "out" / name)["a.q.weight"]
    assert (result == exact.astype(np.float32).astype(ml_dtypes.bfloat16)).mean() > 0.999


def test_a_file_stays_a_file_with_its_header(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", sharded=False) / "model.safetensors"
    model = load(base)
    fold(model, "bb.q.weight")
    plan = plan_checkpoint(model, tmp_path / "out.safetensors", folder=False)
    plan.write()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.safetensors"]
    start = read_header(base).data_start
    assert (tmp_path / "out.safetensors").read_bytes()[:start] == base.read_bytes()[:start]
    assert plan.nbytes == base.stat().st_size
    assert plan.folded == SHAPE[0] * SHAPE[1] * 2


def test_shards_come_together_in_one_file(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", sharded=True)
    write_checkpoint(load(base), tmp_path / "out.safetensors", folder=False)
    result = load_file(tmp_path / "out.safetensors")
    assert result.keys() == (arrays("a") | arrays("bb")).keys()
    for name, array in (arrays("a") | arrays("bb")).items():
        assert result[name].tobytes() == array.tobytes()


def test_another_dtype_is_said_in_header_and_configuration(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", sharded=True)
    model = load(base)
    for name in ("a.q.weight", "a.norm.weight", "bb.q.weight", "bb.norm.weight"):
        fold(model, name, ir.DataType.FLOAT)
    write_checkpoint(model, tmp_path / "out", folder=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float32", "hidden": 1}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * (4 * SHAPE[0] * SHAPE[1] + 4 * 7 + 24), "total_parameters": 5}
    shard = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert shard["bb.norm.weight"].dtype == np.float32
    assert (shard["bb.norm.weight"] == arrays("bb")["bb.norm.weight"].astype(np.float32)).all()
    with safe_open(tmp_path / "out" / "model-00002-of-00002.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_an_untied_head_goes_into_the_last_shard(tmp_path: Path, sharded: bool) -> None:
    base = folder(tmp_path / "base", sharded=sharded)
    model = load(base)
    head = ir.tensor(arrays("a")["a.q.weight"], name="lm_head.weight")
    value = ir.Value(name="lm_head.weight", const_value=head)
    model.ir.graph.register_initializer(value)
    write_checkpoint(model, tmp_path / "out", folder=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    last = "model-00002-of-00002.safetensors" if sharded else "model.safetensors"
    assert load_file(tmp_path / "out" / last)["lm_head.weight"].tobytes() == head.tobytes()
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"]["lm_head.weight"] == last
        first = "model-00001-of-00002.safetensors"
        assert (tmp_path / "out" / first).read_bytes() == (base / first).read_bytes()


def test_a_state_dict_becomes_one_safetensors_file(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "base", sharded=False))
    bare = BaseModel(tmp_path / "state.pt", "state_dict", model.ir, model.sites, traced=False)
    write_checkpoint(bare, tmp_path / "out", folder=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == (arrays("a") | arrays("bb")).keys()


def test_a_graph_is_refused(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "base", sharded=False))
    traced = BaseModel(tmp_path / "m.onnx", "onnx", model.ir, model.sites, traced=True)
    with pytest.raises(UnsupportedError, match="is a checkpoint"):
        write_checkpoint(traced, tmp_path / "out", folder=True)


def test_headers_are_aligned_with_wide_elements_first() -> None:
    tensors = {
        "h": ir.tensor(np.zeros(3, np.float16), name="h"),
        "d": ir.tensor(np.zeros(2, np.float64), name="d"),
        "ü": ir.tensor(np.zeros(1, np.float32), name="ü"),
    }
    header, offsets = safetensors_header(tensors, {"format": "pt"})
    assert offsets == {"d": 0, "ü": 16, "h": 20}
    assert len(header) % 8 == 0
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "d": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
        "ü": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]},
        "h": {"dtype": "F16", "shape": [3], "data_offsets": [20, 26]},
    }
    odd = ir.tensor(np.zeros(2, ml_dtypes.int4), name="odd")
    with pytest.raises(UnsupportedError, match="no dtype INT4"):
        safetensors_header({"odd": odd}, {})
