"""Signals at the worst moments: in the middle of an import, and after the last one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
for _ in range(10):  # where Python runs handlers
    time.sleep(0.01)
whole = True
"""
SCRIPT = """
import signal, sys, time
from loracc.interrupts import catch_interrupts, ignore_interrupts
signal.signal(signal.SIGINT, signal.{before})
catch_interrupts()
try:
    import slow
    {after}
    time.sleep(2)
    print("not interrupted", slow.whole)
except KeyboardInterrupt:
    print("interrupted", sys.modules["slow"].whole)
"""


def outcome(tmp_path: Path, name: str, *, before: str = "default_int_handler", after: str = "pass") -> tuple[str, int]:
    (tmp_path / "slow.py").write_text(SLOW.format(name=name))
    (tmp_path / "script.py").write_text(SCRIPT.format(before=before, after=after))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.stdout.strip(), done.returncode


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_comes_to_its_end(name: str, tmp_path: Path) -> None:
    assert outcome(tmp_path, name) == ("interrupted True", 0)


def test_what_waited_is_forgotten_when_the_work_is_done(tmp_path: Path) -> None:
    assert outcome(tmp_path, "SIGTERM", after="ignore_interrupts()") == ("not interrupted True", 0)


def test_a_background_job_is_not_interrupted(tmp_path: Path) -> None:
    assert outcome(tmp_path, "SIGINT", before="SIG_IGN") == ("not interrupted True", 0)


def test_the_handler_interrupts() -> None:
    from loracc.interrupts import interrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
