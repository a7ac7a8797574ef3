"""Manifests that are damaged, or that lie: refused by name, before anything is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracc.cli import run
from tests.plan_models import N, write_adapter, write_model

pytestmark = pytest.mark.rtx

PLACE = ("weights", "fc.weight", "places", 0)
#: where -> (a lie, words of the message)
LIES: dict[tuple[str | int, ...], tuple[Any, str]] = {
    (*PLACE, "at"): (-8, "places[0].at is -8"),
    (*PLACE, "rows"): (10**30, "places[0].rows"),
    (*PLACE, "run"): (1.5, "places[0].run"),
    (*PLACE, "more"): (1, "places[0].more is not known"),
    ("weights", "fc.weight", "sha256"): (5, "expected a sha256"),
    ("weights", "fc.weight", "shape"): ([[1]], "shape[0]"),
    ("weights", "fc.weight"): (None, "expected an object"),
    ("weights",): ([], "weights is []"),
    ("options",): ({}, "options.marked is missing"),
    ("options", "marked"): (3, "expected a list"),
    ("options", "refittable"): (["all"], "none, adapter or all"),
    ("inputs", 0, "dtype"): ("WOBBLE", "expected an ONNX type"),
    ("inputs", 0, "shape"): ([-5, 32], "inputs[0].shape[0]"),
    ("model",): ("../../elsewhere.onnx", "the name of a file"),
    ("flavor",): ("wobble", "one of tensorrt, rtx"),
    ("repeats",): ({"differ": "x"}, "repeats['differ']"),
    ("profiles",): ([{"x": [[1]]}], "expected a list of 3"),
    ("format",): (99, "format"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.onnx, an adapter, base.engine."""
    monkeypatch.chdir(tmp_path)
    write_model("base.onnx", np.float32)
    write_adapter("adapter")
    profile = ["--profile", f"x:1x{N}:4x{N}:16x{N}"]
    assert run(["build-trt", "base.onnx", "-o", "base.engine", "--flavor", "rtx", "--quiet", *profile]) == 0
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    """By every command that reads an engine."""
    for arguments in (
        ["verify", "base.engine", "lie.engine"],
        ["bench", "lie.engine", "lie.engine", "--provider", "tensorrt"],
        ["refit-trt", "lie.engine", "--adapter", "adapter", "-o", "out.engine"],
        ["build-trt", "base.onnx", "-o", "out.engine", "--flavor", "rtx", "--like", "lie.engine"],
    ):
        assert run(arguments) == 2
        said = capsys.readouterr().err
        assert words in said, (arguments, said)
        assert "Traceback" not in said and not list(Path().glob("*out*"))


def test_a_manifest_that_lies_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("base.engine", "lie.engine")
    told = Path("base.engine.json").read_text()
    for (*before, last), (lie, words) in LIES.items():
        body = json.loads(told)
        inside = body
        for key in before:
            inside = inside[key]
        inside[last] = lie
        Path("lie.engine.json").write_text(json.dumps(body))
        refused(capsys, words)


def test_damaged_files_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, told = Path("base.engine").read_bytes(), Path("base.engine.json").read_bytes()
    refused(capsys, "no such file")
    Path("lie.engine").mkdir()
    refused(capsys, "a folder")
    Path("lie.engine").rmdir()
    Path("lie.engine").write_bytes(plan)
    refused(capsys, "no manifest lie.engine.json")
    Path("lie.engine.json").write_bytes(told)
    for cut in (0, 1000):
        Path("lie.engine").write_bytes(plan[:cut])
        refused(capsys, "its sha256 is another")
    Path("lie.engine").write_bytes(plan)
    for text in (b"", b"hello", b"[1, 2]", b"\xff\xfe\x00", told[:-40], b"[" * 100_000):
        Path("lie.engine.json").write_bytes(text)
        refused(capsys, "not a manifest")


def test_engines_are_run_by_tensorrt_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "base.engine", "base.engine"]) == 2
    assert "--provider tensorrt" in capsys.readouterr().err
