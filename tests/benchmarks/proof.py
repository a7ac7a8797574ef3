"""Every timing that the verifier's claims rest on, one after the other: about seven minutes on two quiet cores.

python -m tests.benchmarks.proof
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main() -> int:
    commands = (
        [sys.executable, "-m", "tests.benchmarks.latency_verdicts"],
        [sys.executable, "samples/latency_table.py", "--seconds", "6"],
    )
    return max(subprocess.run(command, cwd=ROOT, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
