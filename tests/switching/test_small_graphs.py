"""Graphs of one product: α of a Gemm, batches of fixed size, records that are not true of their graph, absurd sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

import loracc
from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.formats.runtime_adapter import write_runtime_adapter
from loracc.manifest import MANIFEST_KEY, Manifest
from loracc.runtime import load_adapter
from loracc.switching.slots import fill_slot
from tests.graphs import Builder
from tests.switching.peft_adapters import Array, session

R, IN, OUT = 2, 8, 12


def adapter(path: Path, seed: int = 0) -> tuple[Path, Array]:
    """A file for "lin", and its ΔW ``[out, in]`` at alpha = rank."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((R, IN), (OUT, R)))
    save_file({"base_model.model.lin.lora_A.weight": a, "base_model.model.lin.lora_B.weight": b}, path)
    return path, b @ a


def saved(path: Path, make: Callable[[Builder], ir.Value]) -> Path:
    build = Builder()
    ir.save(build.model(make(build)), path)
    return path


def product(build: Builder) -> ir.Value:
    return build("MatMul", build.input("x", ["batch", "rows", IN]), build.weight((IN, OUT), "lin.weight"))


@pytest.mark.parametrize("slots", [2, 40])  # in columns or gathered, whichever is cheaper
@pytest.mark.parametrize(
    ("alpha", "beta", "bias"), [(0.5, 2.0, True), (-2.0, 0.5, True), (-0.5, 0.0, True), (3.0, 1.0, False)]
)
def test_alpha_of_a_gemm(alpha: float, beta: float, bias: bool, slots: int, tmp_path: Path) -> None:
    def gemm(build: Builder) -> ir.Value:
        given = [build.input("x", ["batch", IN]), build.weight((OUT, IN), "lin.weight")]
        bias_ = [build.weight((OUT,), "lin.bias")] if bias else []
        return build("Gemm", *given, *bias_, alpha=alpha, beta=beta, transB=1)

    base, (file, delta) = saved(tmp_path / "base.onnx", gemm), adapter(tmp_path / "a.safetensors")
    result = loracc.attach(base, [file], tmp_path / "out.onnx", mode="batched", slots=slots, alpha=R)
    assert result.verification is not None and result.verification.verdict == "pass"
    running, x = session(tmp_path / "out.onnx"), np.random.default_rng(1).standard_normal((3, IN)).astype(np.float32)
    x[1] = 0.0  # a product without bias is zero there, and its sign the base's
    off, on = (running.run(None, {"x": x, "adapter_ids": np.array(ids)})[0] for ids in ([-1, -1, -1], [0, -1, -1]))
    np.testing.assert_allclose(on[0] - off[0], alpha * x[0] @ delta.T, atol=1e-5)
    assert on[1:].tobytes() == session(base).run(None, {"x": x})[0][1:].tobytes()


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_of_fixed_size(batch: int, tmp_path: Path) -> None:
    """With the rows first, a batch of 4 beside 4 rows cannot be told from them: equal numbers prove nothing."""

    def turned(build: Builder) -> ir.Value:
        x = build("Transpose", build.input("x", [batch, 4, IN]), perm=[1, 0, 2])
        return build("MatMul", x, build.weight((IN, OUT), "lin.weight"))

    base, (file, _) = saved(tmp_path / "base.onnx", turned), adapter(tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match="cannot be told"):
        loracc.attach(base, [file], tmp_path / "out.onnx", mode="batched", alpha=R)


def test_a_batch_that_is_not_the_first_axis(tmp_path: Path) -> None:
    def turned(build: Builder) -> ir.Value:
        return build("MatMul", build.input("x", ["sequence", "batch_size", IN]), build.weight((IN, OUT), "lin.weight"))

    base, (file, _) = saved(tmp_path / "base.onnx", turned), adapter(tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedError, match=r"shape \[sequence, batch_size, 8\].*cannot be told"):
        loracc.attach(base, [file], tmp_path / "out.onnx", mode="batched", alpha=R)


def test_a_fixed_batch_that_is_told(tmp_path: Path) -> None:
    def straight(build: Builder) -> ir.Value:
        return build("MatMul", build.input("x", [3, 4, IN]), build.weight((IN, OUT), "lin.weight"))

    base, (file, delta) = saved(tmp_path / "base.onnx", straight), adapter(tmp_path / "a.safetensors")
    loracc.attach(base, [file], tmp_path / "out.onnx", mode="batched", alpha=R)
    running, x = session(tmp_path / "out.onnx"), Builder().random(3, 4, IN)
    off, on = (running.run(None, {"x": x, "adapter_ids": np.array(ids)})[0] for ids in ([-1, -1, -1], [-1, 0, -1]))
    np.testing.assert_allclose(on - off, (x @ delta.T) * np.array([0, 1, 0]).reshape(3, 1, 1), atol=1e-5)


_EDITS: dict[str, Callable[[Any], object]] = {
    "features": lambda record: record["branches"][0].update(features=10**13),
    "columns": lambda record: record["branches"][0]["weights"][0].update(out=10**13),
    "layout": lambda record: record["branches"][0].update(layout="heap"),
    "kind": lambda record: record["branches"][0].update(kind="conv"),
    "weights": lambda record: record["branches"][0].update(weights=[]),
    "name": lambda record: record["branches"][0].update(name="nothing"),
    "alias": lambda record: record["branches"][0]["weights"][0].update(name="lin.weight"),
    "place": lambda record: record["branches"][0]["weights"][0]["places"][0].update(start=-5, stop=99),
    "narrow": lambda record: record["branches"][0]["weights"][0]["places"][0].update(start=3),
    "branches": lambda record: record.update(branches=[]),
    "dtype": lambda record: record.update(dtype="INT4"),
    "rank": lambda record: record.update(rank=10**12),
    "negative": lambda record: record.update(rank=-3),
    "slots": lambda record: record.update(slots=[""] * 50),
}


@pytest.mark.parametrize("mode", ["inputs", "batched"])
@pytest.mark.parametrize("edit", list(_EDITS))
def test_records_that_are_not_true(edit: str, mode: str, tmp_path: Path) -> None:
    if mode == "inputs" and edit in ("layout", "rank", "negative", "slots"):
        pytest.skip("means nothing to a graph of inputs")
    base, (file, _) = saved(tmp_path / "base.onnx", product), adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.onnx"
    loracc.attach(base, [file], out, mode=mode, alpha=R, verify=False)
    proto = onnx.load(out)
    [entry] = [entry for entry in proto.metadata_props if entry.key == MANIFEST_KEY]
    record = json.loads(entry.value)
    _EDITS[edit](record)
    entry.value = json.dumps(record)
    onnx.save(proto, out)
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"out\.onnx: its record"):
        if mode == "batched":
            fill_slot(out, 0, file, alpha=R)
        else:
            loracc.attach(out, [file], tmp_path / "more.onnx_adapter", alpha=R)
    assert out.read_bytes() == before and not (tmp_path / "more.onnx_adapter").exists()


def test_a_linked_graph_keeps_its_link_and_mode(tmp_path: Path) -> None:
    base, (file, delta) = saved(tmp_path / "base.onnx", product), adapter(tmp_path / "a.safetensors")
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store/out.onnx", tmp_path / "link.onnx"
    loracc.attach(base, [file], real, mode="batched", slots=2, alpha=R, verify=False)
    real.chmod(0o640)
    link.symlink_to(real)
    fill_slot(link, 1, file, alpha=R)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in real.parent.iterdir()] == ["out.onnx"]
    running, x = session(real), Builder().random(2, 3, IN)
    off, on = (running.run(None, {"x": x, "adapter_ids": np.array(ids)})[0] for ids in ([-1, -1], [1, -1]))
    np.testing.assert_allclose((on - off)[0], x[0] @ delta.T, atol=1e-5)
    assert on[1].tobytes() == off[1].tobytes()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mode": "batched", "slots": 10**11}, "room for at most 65,536"),
        ({"mode": "batched", "rank": 10**13}, "more than there is memory for"),
        ({"sums": ["../x=a"]}, "cannot be the name of a file"),
        ({"sums": [f"{'n' * 300}=a"]}, "cannot be the name of a file"),
        ({"sums": ["n=a@-0"]}, "other than zero"),
    ],
)
def test_calls_that_are_refused(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, (file, _) = saved(tmp_path / "base.onnx", product), adapter(tmp_path / "a.safetensors")
    with pytest.raises(LoraccError, match=message):
        loracc.attach(base, [file], tmp_path / "out.onnx", alpha=R, **told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.onnx"]


_HALVES: dict[str, dict[str, Array]] = {
    "A alone": {"lin.lora_A.weight": np.ones((IN, 2), np.float32)},
    "two ranks": {
        "lin.lora_A.weight": np.ones((IN, 2), np.float32),
        "lin.lora_B.weight": np.ones((3, OUT), np.float32),
    },
    "float16": {"lin.lora_A.weight": np.ones((IN, 2), np.float16), "lin.lora_B.weight": np.ones((2, OUT), np.float16)},
    "narrow": {"lin.lora_A.weight": np.ones((5, 2), np.float32), "lin.lora_B.weight": np.ones((2, OUT), np.float32)},
}


@pytest.mark.parametrize("case", list(_HALVES))
def test_forged_adapters(case: str, tmp_path: Path) -> None:
    """Right version numbers, wrong parameters: refused when loaded, and not by a run."""
    base, (file, _) = saved(tmp_path / "base.onnx", product), adapter(tmp_path / "a.safetensors")
    loracc.attach(base, [file], tmp_path / "out.onnx", alpha=R, verify=False)
    running = session(tmp_path / "out.onnx")
    manifest = Manifest.from_metadata(running.get_modelmeta().custom_metadata_map, "out")
    write_runtime_adapter(tmp_path / "forged.onnx_adapter", _HALVES[case], manifest)
    with pytest.raises(InputError, match=r"forged\.onnx_adapter: .*(belong together|does not fit)"):
        load_adapter(running, tmp_path / "forged.onnx_adapter")


@pytest.mark.parametrize("told", [{"mode": "batched"}, {"original": "elsewhere"}, {"dtype": "fp16"}])
def test_one_more_adapter_takes_no_other_options(told: dict[str, Any], tmp_path: Path) -> None:
    base, (file, _) = saved(tmp_path / "base.onnx", product), adapter(tmp_path / "a.safetensors")
    loracc.attach(base, [file], tmp_path / "out.onnx", alpha=R, verify=False)
    with pytest.raises(InputError, match=r"means nothing to an \.onnx_adapter"):
        loracc.attach(tmp_path / "out.onnx", [file], tmp_path / "more.onnx_adapter", alpha=R, **told)
