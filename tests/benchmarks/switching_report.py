"""Every measurement of switching, on one page: ``docs/switching-benchmarks.md``.

::

    python -m tests.benchmarks.switching_report --out docs/switching-benchmarks.md

Wants the machine for itself: about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loracc.runners.runner import onnxruntime
from tests.benchmarks import attach_modes, hundred_adapters, session_memory, switching_soak

__all__ = ["main"]

_INTRODUCTION = """# Switching: what was measured

Written by `python -m tests.benchmarks.switching_report`. How the modes work: [variants.md](variants.md).
Ratios are to the base of the same run, in interleaved blocks over several processes, with 95 % bootstrap intervals over
processes and blocks; "base again" is a second copy of the base against it, and what is closer to 1 than that is noise.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Every measurement of switching, as one page.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="per row of a latency table")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--soak", type=float, default=60.0, help="seconds")
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    options = parser.parse_args(arguments)
    timing = {"seconds": options.seconds, "processes": options.processes, "folder": options.folder}
    steps: list[tuple[str, Callable[[], str]]] = [
        ("Latency and switching, GPT-2 124M", lambda: attach_modes.report("gpt2-124m", **timing)),
        ("Latency and switching, a tiny model", lambda: attach_modes.report("gpt2-tiny", **timing)),
        ("A hundred adapters", lambda: hundred_adapters.report("gpt2-5m", folder=options.folder)),
        (
            "Ten adapters of GPT-2 124M",
            lambda: hundred_adapters.report("gpt2-124m", counts="1,10", folder=options.folder),
        ),
        ("A further session of GPT-2 124M", lambda: session_memory.report("gpt2-124m", folder=options.folder)),
        ("Eight threads that switch at random", lambda: switching_soak.report(seconds=options.soak)),
    ]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux; onnxruntime {onnxruntime().__version__}, "
    parts = [_INTRODUCTION, f"Machine: {machine}numpy {np.__version__}."]
    for title, step in steps:
        print(title, flush=True)
        parts += [f"## {title}", step()]
        options.out.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
