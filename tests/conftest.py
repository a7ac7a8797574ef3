"""Tests that need what a machine may lack: ``trt``, ``rtx`` and ``gpu``. What was not run is said in the summary."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable

import pytest

from loracc.devices import gpu_name

#: Marker -> (whether it can be run here, what is missing).
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "trt": (lambda: importlib.util.find_spec("tensorrt") is not None, "TensorRT is not installed"),
    "rtx": (lambda: importlib.util.find_spec("tensorrt_rtx") is not None, "TensorRT for RTX is not installed"),
    "gpu": (lambda: gpu_name() is not None, "no GPU"),
}
_PREFIX = "needs "


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (here, missing) in NEEDS.items():
        if item.get_closest_marker(marker) and not here():
            pytest.skip(f"{_PREFIX}{marker}: {missing}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason: a run on a machine without a GPU must not look like a run on one."""
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")]
    for reason, count in sorted(Counter(r for r in reasons if r.startswith(_PREFIX)).items()):
        terminalreporter.write_line(f"not run: {count} tests, {reason.removeprefix(_PREFIX)}")
