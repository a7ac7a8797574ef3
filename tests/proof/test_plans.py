"""``verify`` on two engines: bytes outside the weights, and what must not be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from loracc.cli import run
from loracc.devices import gpu_name
from tests.plan_models import N, write_adapter, write_attention, write_model

pytestmark = pytest.mark.rtx

PROFILE = ["--profile", f"x:1x{N}:4x{N}:16x{N}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_adapter("adapter")
    return tmp_path


def build(*arguments: str) -> None:
    assert run(["build-trt", *arguments, "--flavor", "rtx", "--quiet", "--force"]) == 0


def verdict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    capsys.readouterr()
    code = run(["verify", *arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    return code, result["structure"] | {"numbers": result["numbers"]["verdict"]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_folding_changes_nothing_but_the_weight(
    here: Path, capsys: pytest.CaptureFixture[str], dtype: type[np.floating]
) -> None:
    write_model("base.onnx", dtype, external=True)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    assert run(["fold", "base.onnx", "adapter", "-o", "folded.onnx", "--quiet"]) == 0
    build("folded.onnx", "-o", "folded.engine", *PROFILE)
    build("base.onnx", "--adapter", "adapter", "-o", "out.engine", *PROFILE)
    assert Path("folded.engine").read_bytes() == Path("out.engine").read_bytes()
    for out in ("folded.engine", "out.engine"):
        code, structure = verdict(capsys, "base.engine", out)
        assert (code, structure["verdict"]) == (0, "pass")
    if gpu_name() is None:
        assert structure["summary"].endswith("layer lists: skipped, no GPU")
    assert "1 weights differ" in structure["summary"] and " 0 outside; " in structure["summary"]


def test_a_byte_outside_the_weights_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest is made to agree with the damaged plan: the comparison itself must see it."""
    import hashlib

    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    build("base.onnx", "--adapter", "adapter", "-o", "out.engine", *PROFILE)
    plan = bytearray(Path("out.engine").read_bytes())
    plan[100] ^= 1
    Path("out.engine").write_bytes(plan)
    assert run(["verify", "base.engine", "out.engine"]) == 2  # the digest
    manifest = json.loads(Path("out.engine.json").read_text())
    manifest["plan_sha256"] = hashlib.sha256(plan).hexdigest()
    Path("out.engine.json").write_text(json.dumps(manifest))
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "inconclusive") and "1 bytes differ outside" in structure["reason"]
    for name in ("base", "out"):  # what --repeats records where the builds are equal
        told = json.loads(Path(f"{name}.engine.json").read_text())
        Path(f"{name}.engine.json").write_text(json.dumps(told | {"repeats": {"builds": 3, "differ": 0}}))
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "fail")
    assert structure["reason"].startswith("1 bytes differ outside the weights") and "at 100" in structure["reason"]
    # Where the base's own builds are known to differ, that byte says nothing, and is not a pass either.
    base = json.loads(Path("base.engine.json").read_text())
    Path("base.engine.json").write_text(json.dumps(base | {"repeats": {"builds": 2, "differ": 14}}))
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "inconclusive") and "2 builds" in structure["reason"]


def test_repeated_builds_are_compared(here: Path) -> None:
    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", "--repeats", "2", *PROFILE)
    assert json.loads(Path("base.engine.json").read_text())["repeats"] == {"builds": 2, "differ": 0}
    build("base.onnx", "-o", "once.engine", *PROFILE)
    assert json.loads(Path("once.engine.json").read_text())["repeats"] == {}


def test_a_lying_offset_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    build("base.onnx", "--adapter", "adapter", "-o", "out.engine", *PROFILE)
    for name in ("base", "out"):
        manifest = json.loads(Path(f"{name}.engine.json").read_text())
        manifest["weights"]["fc.weight"]["places"][0]["at"] -= 8
        Path(f"{name}.engine.json").write_text(json.dumps(manifest))
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "inconclusive")


def test_equal_constants_are_stored_once_and_that_is_explained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model("base.onnx", np.float32, equal=True)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    build("base.onnx", "--adapter", "adapter", "-o", "out.engine", *PROFILE)
    assert Path("base.engine").stat().st_size < Path("out.engine").stat().st_size
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "inconclusive")
    assert "fc.weight = head.weight in the base" in structure["reason"]


def test_another_model_and_another_build_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    build("base.onnx", "-o", "tf32.engine", "--tf32", *PROFILE)
    assert "another tf32" in verdict(capsys, "base.engine", "tf32.engine")[1]["reason"]
    model = onnx.load("base.onnx")
    model.graph.node[1].op_type = "Tanh"
    onnx.save(model, "other.onnx")
    build("other.onnx", "-o", "other.engine", *PROFILE)
    assert "different graphs" in verdict(capsys, "base.engine", "other.engine")[1]["reason"]


def test_nothing_folded_is_no_pass(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    code, structure = verdict(capsys, "base.engine", "base.engine")
    assert (code, structure["numbers"]) == (1, "fail")


def test_wrong_calls(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model("base.onnx", np.float32)
    build("base.onnx", "-o", "base.engine", *PROFILE)
    shutil.copy("base.engine", "foreign.engine")
    calls = {
        ("base.engine", "foreign.engine"): "no manifest foreign.engine.json",
        ("base.engine", "base.onnx"): "the other is none",
        ("base.engine", "nowhere.engine"): "no such file",
        ("base.engine", "base.engine", "--adapter", "adapter"): "in their manifests",
    }
    for arguments, words in calls.items():
        assert run(["verify", *arguments]) == 2
        assert words in capsys.readouterr().err
    if gpu_name() is None:
        assert run(["bench", "base.engine", "base.engine", "--provider", "tensorrt", "--processes", "1"]) == 2
        assert "GPU" in capsys.readouterr().err
    Path("foreign.engine.json").write_text('{"format": 1}')
    assert run(["verify", "base.engine", "foreign.engine"]) == 2
    assert "not a manifest" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_the_builder_takes_apart_is_found_in_blocks(
    here: Path, capsys: pytest.CaptureFixture[str], dtype: type[np.floating]
) -> None:
    write_attention("base.onnx", dtype)
    profile = ["--profile", f"x:1x1x{N}:2x8x{N}:4x16x{N}"]
    build("base.onnx", "-o", "base.engine", *profile)
    write_adapter("adapter", 3 * N)
    build("base.onnx", "--adapter", "adapter", "-o", "out.engine", "--like", "base.engine", *profile)
    places = json.loads(Path("out.engine.json").read_text())["weights"]["fc.weight"]["places"]
    assert len(places) == 3 and {place["rows"] for place in places} == {N}
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (0, "pass")
