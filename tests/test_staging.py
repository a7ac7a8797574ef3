"""The output appears whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loracc.errors import InputError
from loracc.staging import Staging, check_destination


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_pair(stage: Staging, text: bytes) -> None:
    stage.path.write_bytes(text)
    stage.path.with_name(stage.path.name + ".data").write_bytes(text * 2)


def test_files_come_into_place_with_their_companions(tmp_path: Path) -> None:
    with Staging(tmp_path / "out.onnx") as stage:
        write_pair(stage, b"new")
        assert stage.path.name == "out.onnx"
        assert not (tmp_path / "out.onnx").exists()
    assert stage.files == ["out.onnx.data", "out.onnx"]
    assert listing(tmp_path) == {"out.onnx": b"new", "out.onnx.data": b"newnew"}
    assert sorted(os.listdir(tmp_path)) == ["out.onnx", "out.onnx.data"]


def test_a_folder_comes_into_place_with_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    with Staging(tmp_path / "out", folder=True) as stage:
        (stage.path / "model.safetensors").write_bytes(b"x")
    assert listing(tmp_path) == {"out/model.safetensors": b"x"}
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "reference").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Staging(tmp_path / "out.onnx") as stage:
        write_pair(stage, b"new")
        raise error
    assert listing(tmp_path) == {}
    assert os.listdir(tmp_path) == []


def test_an_exception_keeps_what_force_would_have_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"old")
    with pytest.raises(RuntimeError), Staging(tmp_path / "out.onnx", force=True) as stage:
        write_pair(stage, b"new")
        raise RuntimeError
    assert listing(tmp_path) == {"out.onnx": b"old"}


def test_force_replaces_files_and_removes_a_stale_companion(tmp_path: Path) -> None:
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    with Staging(tmp_path / "out.onnx", force=True, companions=["out.onnx.data"]) as stage:
        stage.path.write_bytes(b"new")
    assert listing(tmp_path) == {"out.onnx": b"new"}


def test_force_replaces_a_model_folder_only(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "diary.txt").write_bytes(b"dear")
    with pytest.raises(InputError, match="holds no model"):
        Staging(old, force=True, folder=True)
    (old / "config.json").write_bytes(b"{}")
    with Staging(old, force=True, folder=True) as stage:
        (stage.path / "config.json").write_bytes(b"new")
    assert listing(tmp_path) == {"old/config.json": b"new"}


def test_a_failed_move_restores_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out.onnx" and "new" in Path(source).parts:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(InputError, match="moved into place"),
        Staging(tmp_path / "out.onnx", force=True, companions=["out.onnx.data"]) as stage,
    ):
        write_pair(stage, b"new")
    assert listing(tmp_path) == {"out.onnx": b"old", "out.onnx.data": b"old"}


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"), Staging(tmp_path / "out.onnx") as stage:
        write_pair(stage, b"new")
        (tmp_path / "out.onnx").write_bytes(b"somebody else's")
    assert listing(tmp_path) == {"out.onnx": b"somebody else's"}


def test_a_full_disk_names_the_bytes_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="disk is full: 12,345 bytes"), Staging(tmp_path / "out.onnx") as stage:
        stage.expected_bytes = 12345
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_a_really_full_device_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="disk is full"),
        Staging(tmp_path / "out.onnx"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")
        file.flush()


def test_refused_destinations(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    os.link(file, tmp_path / "link.onnx")
    (tmp_path / "symlink.onnx").symlink_to(file)
    for destination, options, message in (
        (tmp_path / "none" / "out.onnx", {}, "does not exist"),
        (file / "out.onnx", {}, "is not a folder"),
        (file, {}, "exists already"),
        (base, {}, "a folder, and the output is a file"),
        (file, {"folder": True}, "a file, and the output is a folder"),
        (file, {"inputs": [file], "force": True}, "is the input"),
        (tmp_path / "link.onnx", {"inputs": [file], "force": True}, "is the input"),
        (tmp_path / "symlink.onnx", {"inputs": [file], "force": True}, "is the input"),
        (base / "out.onnx", {"inputs": [base]}, "inside the input folder"),
        (base, {"inputs": [base / "config.json"], "folder": True, "force": True}, "holds the input"),
        (tmp_path / "new.onnx", {"companions": ["model.onnx"]}, "exists already"),
    ):
        with pytest.raises(InputError, match=message):
            check_destination(destination, **options)
    check_destination(tmp_path / "new.onnx", inputs=[file, base])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="not writable"):
            check_destination(tmp_path / "out.onnx")
    finally:
        tmp_path.chmod(0o700)


_CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
from pathlib import Path
from loracc.staging import Staging
with Staging(Path(sys.argv[1])) as stage:
    stage.path.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "out.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        started = time.monotonic()
        child.send_signal(number)
        assert child.wait(timeout=30) == code
        assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == []
