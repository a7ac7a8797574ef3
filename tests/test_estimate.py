"""``--dry-run``: what would be written, and what it would take, before anything is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.adapter import Delta
from loracc.cli import run
from loracc.deltas import LowRank
from loracc.estimate import estimate
from loracc.folded import Binding, FoldedTensor
from loracc.kinds.kronecker import LoKr
from loracc.sites import Site
from loracc.streaming import OutputFile, Segment
from loracc.targets.plan import WritePlan
from loracc.tensors import file_tensor
from tests.benchmarks.workloads import make


def folded(file: Path, delta: Delta, rows: int, columns: int) -> FoldedTensor:
    """A float32 weight of holes."""
    with open(file, "wb") as out:
        out.truncate(rows * columns * 4)
    base = file_tensor(file, 0, rows * columns * 4, ir.DataType.FLOAT, (rows, columns), "w")
    return FoldedTensor(base, [Binding(Site("m", "weight", "linear", "w"), delta, "a", "m.weight", "name")])


def factors(rows: int, columns: int) -> tuple[np.ndarray[tuple[int, int]], np.ndarray[tuple[int, int]]]:
    return np.ones((rows, 2), np.float32), np.ones((2, columns), np.float32)


def plan(tensor: FoldedTensor, path: Path) -> WritePlan:
    size = tensor.nbytes
    return WritePlan((OutputFile(path, size, (Segment(0, tensor),)),), nbytes=size, folded=size)


def test_memory_is_that_of_tiles_unless_a_kind_forms_its_change_whole(tmp_path: Path) -> None:
    rows, columns = 40_000, 2_000
    b, a = factors(rows, columns)
    lora = folded(tmp_path / "w", LowRank(a, b, 1.0), rows, columns)
    lokr = folded(tmp_path / "w", LoKr(1.0, (b[:, :1],), (a[:1],), (rows, columns)), rows, columns)
    small, large = (estimate(plan(tensor, tmp_path / "out"), [tensor]) for tensor in (lora, lokr))
    assert large.memory - small.memory >= rows * columns * 8  # ΔW in float64
    assert 0 < small.seconds < 60
    assert not (tmp_path / "out").exists()


def test_what_a_dry_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("tiny", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["fold", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--dry-run"]
    assert run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    linears = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert told["folded_bytes"] == 2 * linears
    assert told["bytes"] > told["folded_bytes"]
    assert told["estimate"]["seconds"] > 0
    assert told["estimate"]["memory_bytes"] > 16 << 20
    assert run(command) == 0
    assert "2.36 MB folded, " in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
