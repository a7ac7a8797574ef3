"""Standard streams that are closed, full or narrow, names that a terminal would obey, and limits of the system."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from loracc.cli import run

ODD = "a[/b].[red]:smile:\x1b[31mq"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint and an adapter for it, at a module whose name is markup and holds a control sequence."""
    monkeypatch.chdir(tmp_path)
    save_file({f"{ODD}.weight": np.ones((6, 8), np.float32)}, "base.safetensors")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    factors = {"A": np.ones((2, 8), np.float32), "B": np.ones((6, 2), np.float32)}
    tensors = {f"base_model.model.{ODD}.lora_{name}.weight": array for name, array in factors.items()}
    save_file(tensors, "adapter/adapter_model.safetensors")
    return tmp_path


FOLD = ["fold", "base.safetensors", "adapter", "-o", "out.safetensors"]


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m loracc {' '.join(FOLD)} {line}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_names_are_no_markup_and_no_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(FOLD) == 0
    for arguments in (
        ["inspect", "adapter"],
        ["extract", "base.safetensors", "out.safetensors", "-o", "x", "--rank", "2"],
    ):
        assert run(arguments) == 0
    save_file({"other.weight": np.ones((6, 8), np.float32)}, "other.safetensors")
    assert run(["fold", "other.safetensors", "adapter", "-o", "o.safetensors"]) == 2
    shown = capsys.readouterr()
    assert "a[/b].[red]:smile:\\x1b[31mq" in shown.out and "a[/b].[red]:smile:\\x1b[31mq" in shown.err
    assert "\x1b" not in shown.out + shown.err


def test_closed_streams(here: Path) -> None:
    """The files that are written are not the log."""
    assert shell("<&- >&- 2>&-").returncode == 0
    np.testing.assert_array_equal(load_file("out.safetensors")[f"{ODD}.weight"], np.full((6, 8), 5, np.float32))


def test_a_stream_that_cannot_say_everything(here: Path) -> None:
    done = shell("", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u0394W" in done.stdout and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_is_said(here: Path) -> None:
    done = shell("--json >/dev/full")
    assert done.returncode == 2 and "standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and Path("out.safetensors").exists()
    assert shell("--json >/dev/full").returncode == 2  # it exists already


def limited(arguments: list[str], limit: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loracc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)


def test_what_the_system_refuses_is_no_bug(here: Path) -> None:
    """A name that is too long, and a file that may not grow: also where ONNX Runtime writes it."""
    before = sorted(here.rglob("*"))
    for arguments in (
        ["fold", "base.safetensors", "adapter", "-o", f"{'a' * 300}.safetensors"],
        ["convert", "adapter", "-o", "out.onnx_adapter"],
    ):
        done = limited(arguments, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert sorted(here.rglob("*")) == before


def test_too_little_memory_is_no_bug(here: Path) -> None:
    """Sixteen gigabytes of random numbers for a process that may have four."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], "/fc/MatMul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 6])],
        [numpy_helper.from_array(np.ones((8, 6), np.float32), "fc.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "base.onnx")
    done = limited(
        ["fold", "base.onnx", "adapter", "-o", "out.onnx", "--input", "x:float32[250000000,8]"],
        lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 2 and "not enough memory" in done.stderr and "--no-verify" in done.stderr
