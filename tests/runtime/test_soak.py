"""The benchmark's soak for three seconds; nothing is asserted about time or memory."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.switching_soak import prepare, soak


def test_eight_threads_that_switch_at_random_get_the_right_outputs(tmp_path: Path) -> None:
    expected = prepare(tmp_path, 6, width=64, inner=128)
    found = soak(tmp_path / "out.onnx", expected, seconds=3.0, threads=8, capacity=2)
    assert not found.wrong
    assert found.calls > 50 and found.loads > 6
