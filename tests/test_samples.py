"""The samples run as their pages say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_switching(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "samples.switching.main", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "300 requests, 3 styles, largest relative error to unmerged PEFT" in done.stdout
