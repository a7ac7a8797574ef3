"""How long a fold takes beside copying the file and beside PEFT, in one run, alternately.

::

    python -m tests.benchmarks.fold_speed llama-1b --peft --rounds 5

Each round runs every contender once, after :func:`settle` and with the output of the one before removed; the inputs
are read once before the first round, so that all find them in the page cache. Wall, CPU and peak memory are the child
process's own (``os.wait4``). What is printed is Markdown: medians, and the median of the paired ratios to ``cp -r``.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.workloads import WORKLOADS, make

__all__ = ["PEFT", "Run", "main", "measure", "settle", "table", "warm"]

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

#: More than any contender writes or holds of what all write.
_FREE_BYTES = 6 << 30
#: A child's peak memory counts from that of the process it was forked from: this one is small.
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)])
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Run:
    """What one child process took: seconds, seconds, bytes."""

    wall: float
    cpu: float
    peak: int


def settle() -> None:
    """Before a run: nothing waits for the disk, and free memory is the machine's.

    A virtual machine gives back to its host what has been free for two seconds; ``cp`` of 2.2 GB then takes 4 s in
    place of 0.6, and whoever runs next pays.
    """
    os.sync()
    with mmap.mmap(-1, _FREE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def measure(command: Sequence[str]) -> Run:
    """Run a command to its end.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, check=True, env=environment)
    wall, cpu, peak = done.stdout.split()
    return Run(float(wall), float(cpu), int(peak))


def contenders(folder: Path, *, peft: bool) -> dict[str, list[str]]:
    """The commands, by name; each writes ``folder/out``."""
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    fold = [sys.executable, "-m", "loracc", "fold", base, adapter, "-o", out, "--no-verify", "--quiet"]
    found = {"cp -r": ["cp", "-r", base, out], "loracc fold": fold}
    if peft:
        found["PEFT load, merge, save"] = [sys.executable, "-c", PEFT, base, adapter, out]
    return found


def rounds(folder: Path, count: int, *, peft: bool) -> dict[str, list[Run]]:
    """Every contender once a round."""
    commands = contenders(folder, peft=peft)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    warm(folder)
    for index in range(count):
        for name, command in commands.items():
            settle()
            runs[name].append(measure(command))
            shutil.rmtree(folder / "out")
            last = runs[name][-1]
            print(f"round {index + 1} {name}: {last.wall:.2f} s, cpu {last.cpu:.2f} s", file=sys.stderr, flush=True)
    return runs


def warm(folder: Path) -> None:
    """Read every input once."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def table(runs: dict[str, list[Run]], size: int, reference: str = "cp -r") -> str:
    """The medians as Markdown."""
    lines = [
        f"| | wall, s (median) | wall, s (all) | CPU, s | peak memory, MB | times {reference} (pairs) | GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        wall = statistics.median(run.wall for run in own)
        ratio = statistics.median(run.wall / other.wall for run, other in zip(own, runs[reference], strict=True))
        cells = (
            name,
            f"{wall:.2f}",
            " ".join(f"{run.wall:.2f}" for run in own),
            f"{statistics.median(run.cpu for run in own):.2f}",
            f"{max(run.peak for run in own) / 1e6:.0f}",
            f"{ratio:.2f}",
            f"{size / wall / 1e9:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fold speed beside cp and PEFT.")
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="run PEFT beside")
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loracc-bench-", dir=options.folder) as name:
        folder = Path(name)
        make(options.workload, folder)
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        runs = rounds(folder, options.rounds, peft=options.peft)
        print(f"{options.workload}: {size / 1e9:.2f} GB, {os.cpu_count()} cores, {options.rounds} rounds\n")
        print(table(runs, size))


if __name__ == "__main__":
    main()
