"""Plans are built in a process of their own: repeatable, interruptible, and no crash of the caller's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracc.cli import run
from loracc.targets import tensorrt_engine, tensorrt_worker
from loracc.targets.tensorrt_process import run_worker
from tests.plan_models import N, write_adapter, write_model

pytestmark = pytest.mark.rtx

PROFILE = ["--profile", f"x:1x{N}:4x{N}:16x{N}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base.onnx and an adapter."""
    monkeypatch.chdir(tmp_path)
    write_model("base.onnx", np.float32)
    write_adapter("adapter")
    return tmp_path


def build(*arguments: str) -> int:
    return run(["build-trt", *arguments, "--flavor", "rtx", "--quiet", *PROFILE])


def verdict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["verify", *arguments, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["structure"]
    return code, result


def test_plans_of_switchable_graphs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base and folded, each a graph with factors as inputs; their tensors are ordered by address."""
    ranked = ["--max-rank", "2"]
    assert run(["fold", "base.onnx", "adapter", "-o", "folded.onnx", "--quiet"]) == 0
    for name in ("base", "folded"):
        assert (
            run(["attach", f"{name}.onnx", "adapter", "--as", "inputs", "-o", f"{name}-at.onnx", "-q", "--force"]) == 0
        )
        assert build(f"{name}-at.onnx", "-o", f"{name}.engine", *ranked) == 0
    assert build("base-at.onnx", "--adapter", "adapter", "-o", "memory.engine", *ranked) == 0
    assert Path("memory.engine").read_bytes() == Path("folded.engine").read_bytes()
    code, structure = verdict(capsys, "base.engine", "folded.engine")
    assert (code, structure["verdict"]) == (0, "pass")
    assert structure["summary"].startswith("1 weights differ") and " 0 outside; " in structure["summary"]


def test_the_same_graph_gives_the_same_plan_wherever_it_is_built(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["attach", "base.onnx", "adapter", "--as", "inputs", "-o", "at.onnx", "--quiet"]) == 0
    Path("a/longer/path/to/it").mkdir(parents=True)
    plans = set()
    for number, folder in enumerate((".", "a/longer/path/to/it", ".")):
        monkeypatch.setenv("ANYTHING", "x" * 5000 * number)
        engine = Path(folder, f"out{number}.engine")
        assert build("at.onnx", "-o", str(engine), "--max-rank", "2") == 0
        plans.add(engine.read_bytes())
    assert len(plans) == 1


def test_random_addresses_are_said_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system fixes no addresses, a difference between two plans may be an order that the next build has."""
    assert build("base.onnx", "-o", "base.engine") == 0
    memory = json.loads(Path("base.engine.json").read_text())["memory"]
    assert len(memory) == (16 if sys.platform == "linux" else 0)
    monkeypatch.setattr(tensorrt_engine, "run_worker", lambda *a, **k: run_worker(*a, **{**k, "fixed": False}))
    assert build("base.onnx", "--adapter", "adapter", "-o", "out.engine") == 0
    manifest = json.loads(Path("out.engine.json").read_text())
    assert manifest["memory"] == ""
    manifest["weights"]["fc.weight"]["places"][0]["run"] -= 8  # eight bytes of the weight are outside now
    digest = _digest_of(Path("out.engine"), manifest["weights"]["fc.weight"]["places"][0])
    for name in ("base", "out"):
        path = Path(f"{name}.engine.json")
        told = json.loads(path.read_text())
        told["weights"]["fc.weight"]["places"] = manifest["weights"]["fc.weight"]["places"]
        told["weights"]["fc.weight"]["sha256"] = (
            digest if name == "out" else _digest_of(Path("base.engine"), manifest["weights"]["fc.weight"]["places"][0])
        )
        path.write_text(json.dumps(told))
    code, structure = verdict(capsys, "base.engine", "out.engine")
    assert (code, structure["verdict"]) == (1, "inconclusive") and "same addresses" in structure["reason"]


def _digest_of(engine: Path, place: dict[str, int]) -> str:
    import hashlib

    return hashlib.sha256(engine.read_bytes()[place["at"] : place["at"] + place["run"]]).hexdigest()


def standing_in(monkeypatch: pytest.MonkeyPatch, path: Path, code: str) -> None:
    """A process that does something else in the worker's place."""
    path.write_text(code)
    monkeypatch.setattr(tensorrt_worker, "__file__", str(path))


def test_a_crash_of_the_library_is_an_error(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(monkeypatch, here / "crash.py", "import os\nos.write(2, b'last words')\nos.kill(os.getpid(), 11)\n")
    assert build("base.onnx", "-o", "out.engine") == 2
    said = capsys.readouterr().err
    assert "SIGSEGV" in said and "last words" in said
    assert not list(here.glob("*out*"))


def test_a_full_disk_is_said_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process answers when it cannot write the plan."""
    answer: dict[str, Any] = {"memory": "", "refused": None, "errno": 28, "messages": []}
    standing_in(monkeypatch, here / "full.py", f"print({json.dumps(json.dumps(answer))})")
    assert build("base.onnx", "-o", "out.engine") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not list(here.glob("*out*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupt_ends_the_build_at_once(here: Path) -> None:
    """The process sleeps where the library would compute."""
    Path("sleeps.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from loracc.targets import tensorrt_worker\n"
        "tensorrt_worker.__file__ = 'sleeps.py'\nfrom loracc.cli import run\nsys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "build-trt", "base.onnx", "-o", "out.engine", "--flavor", "rtx", *PROFILE]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := [int(pid) for pid in children.read_text().split() if b"sleeps" in _command(pid)]):
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not list(here.glob("*out*"))
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
