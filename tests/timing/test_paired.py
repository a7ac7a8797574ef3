"""Blocks of timed units, on simulated clocks; and processes on real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loracc.proof.ratio import estimate
from loracc.runners.runner import RUNNERS, RunError, open_runner
from loracc.timing.job import TimedModel, _write_feeds, read_feeds, time_models
from loracc.timing.paired import measure
from tests.verifying import build, write


class Machine:
    """A simulated machine: every run takes a little longer than the one before, and is faster right after itself."""

    def __init__(self, drift: float = 0.0, warm: float = 0.0) -> None:
        self.runs, self.last, self.drift, self.warm = 0, "", drift, warm

    def model(self, name: str, factor: float) -> Callable[[int], float]:
        def call(repeats: int) -> float:
            took = 0.0
            for _ in range(repeats):
                self.runs += 1
                took += factor * (0.01 + self.drift * self.runs) * (1 - self.warm * (self.last == name))
                self.last = name
            return took

        return call


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_cancel_a_drift(reverse: bool) -> None:
    machine = Machine(drift=1e-5)
    calls = [machine.model("a", 1.0), machine.model("b", 1.05), machine.model("c", 1.0)]
    output, noise = measure(calls, 20.0, reverse=reverse)
    assert output.shape == noise.shape and 5 <= len(output) <= 1000
    assert estimate([output]).value == pytest.approx(1.05, abs=1e-6)
    assert estimate([noise]).value == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("others", [1, 2, 4])
def test_every_model_runs_as_often_after_itself(others: int) -> None:
    """A model whose weights are warm in the caches is faster; no place in the block may get more of that."""
    machine = Machine(warm=0.2)
    calls = [machine.model(str(index), 1.0) for index in range(1 + others)]
    for blocks in measure(calls, 10.0):
        assert estimate([blocks]).value == pytest.approx(1.0, abs=1e-9)


def test_short_runs_are_repeated_until_the_clock_sees_them() -> None:
    asked: list[int] = []

    def call(repeats: int) -> float:
        asked.append(repeats)
        return 1e-4 * repeats

    measure([call, call], 1.0)
    assert asked[-1] == 20


def test_feeds_survive_a_file(tmp_path: Path) -> None:
    feeds = {
        "input/ids:0": np.arange(6).reshape(2, 3),
        "x": np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "flag": np.array(True),
    }
    back = read_feeds(_write_feeds(feeds, tmp_path / "f.npz"))
    assert list(back) == list(feeds)
    for name, array in feeds.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_processes_measure_and_refuse(tmp_path: Path) -> None:
    base = build("mlp")
    path = write(base, base.ir, tmp_path / "base.onnx").path
    models = [TimedModel(str(path))] * 2
    feeds = {"x": np.zeros((4, 16), np.float32)}
    found, names = time_models(models, [feeds] * 2, seconds=0.5, processes=2, threads=1)
    assert [len(blocks) for blocks in found] == [1, 1] and len(names) == 2 and "onnxruntime" in names[0]
    assert all(blocks[0].shape[1] == 2 and (blocks[0] > 0).all() for blocks in found)
    with pytest.raises(RunError, match="does not run the model"):
        time_models(models, [{"x": np.zeros((4, 3), np.float32)}] * 2, seconds=0.5, processes=1)


def test_providers_are_names_of_runners(tmp_path: Path) -> None:
    base = build("mlp")
    path = write(base, base.ir, tmp_path / "base.onnx").path
    runner = open_runner(path, "cpu", threads=1)
    assert runner.timed({"x": np.zeros((4, 16), np.float32)})(3) > 0
    with pytest.raises(Exception, match="no provider 'abacus'") as caught:
        open_runner(path, "abacus")
    assert all(name in str(caught.value.__dict__["hint"]) for name in RUNNERS)
