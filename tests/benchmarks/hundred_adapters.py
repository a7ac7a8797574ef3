"""Disk and resident memory of many adapters over one base: measured, each contender in a process of its own.

::

    python -m tests.benchmarks.hundred_adapters gpt2-5m --counts 1,10,100

Contenders: a folded model an adapter, all loaded; ``variants`` with eight loaded (the default) and with all loaded,
with and without packed weights; ``batched`` and ``inputs`` with all adapters there. Each process loads, runs every
adapter once on 1 x 16 tokens, and reads its own resident memory (``VmRSS``: mapped files count too).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import loracc
from loracc.runtime import Deployment
from loracc.switching.modes import MODES
from tests.benchmarks.attach_modes import ADAPTERS
from tests.benchmarks.switching_soak import resident_bytes
from tests.benchmarks.workloads import WORKLOADS, export_base, make_adapter

__all__ = ["main"]

CONTENDERS = {
    "folded": "a folded model each, all loaded",
    "variants-8": "variants, 8 loaded",
    "variants-8-unpacked": "variants, 8 loaded, prepack=False",
    "variants-all": "variants, all loaded",
    "variants-all-unpacked": "variants, all loaded, prepack=False",
    "inputs": "inputs, all loaded",
    "batched": "batched",
}


def run_all(contender: str, folder: Path, count: int) -> int:
    """Load and run everything; the resident bytes then."""
    import onnxruntime

    feed: dict[str, Any] = {
        "input_ids": np.ones((1, 16), np.int64),
        "attention_mask": np.ones((1, 16), np.int64),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if contender == "folded":
        sessions = []
        for index in range(count):
            sessions.append(onnxruntime.InferenceSession(str(folder / f"folded{index}.onnx"), options))
            sessions[-1].run(None, feed)
    elif contender.startswith("variants"):
        capacity = 8 if "-8" in contender else count
        deployment = Deployment(
            folder / "variants.onnx", capacity=capacity, threads=2, prepack="unpacked" not in contender
        )
        for name in deployment.names[:count]:
            deployment.run(name, feed)
        return resident_bytes()
    elif contender == "inputs":
        session = onnxruntime.InferenceSession(str(folder / "inputs.onnx"), options)
        adapters = []
        for index in range(count):
            adapters.append(onnxruntime.LoraAdapter())
            adapters[-1].Load(str(folder / f"a{index}.onnx_adapter"))
            active = onnxruntime.RunOptions()
            active.add_active_adapter(adapters[-1])
            session.run(None, feed, active)
    else:
        session = onnxruntime.InferenceSession(str(folder / f"batched{count}.onnx"), options)
        for index in range(count):
            session.run(None, {**feed, "adapter_ids": np.array([index], np.int64)})
    return resident_bytes()


def build(workload: str, folder: Path, counts: Sequence[int], targets: tuple[str, ...], rank: int) -> None:
    """Everything, in ``folder``."""
    base = export_base(workload, folder / "base.onnx")
    adapters = [
        make_adapter(workload, folder / f"a{index}", targets=targets, rank=rank, seed=str(index))
        for index in range(max(counts))
    ]
    for index, adapter in enumerate(adapters):
        loracc.fold(base, [adapter], folder / f"folded{index}.onnx", verify=False, external="data")
    for mode in ("variants", "inputs"):
        loracc.attach(base, adapters, folder / f"{mode}.onnx", mode=mode, verify=False, external="data")
    if "batched" in MODES:
        for count in counts:
            output = folder / f"batched{count}.onnx"
            loracc.attach(base, adapters[:count], output, mode="batched", verify=False, external="data")


def disk(contender: str, folder: Path, count: int) -> int:
    """Bytes of what a contender needs for ``count`` adapters."""
    indices = range(count)
    if contender == "folded":
        files = [folder / f"folded{index}.onnx{end}" for index in indices for end in ("", ".data")]
    elif contender.startswith("variants"):
        own = [folder / "variants.onnx.variants" / f"a{index}.safetensors" for index in indices]
        files = [folder / "variants.onnx", folder / "variants.onnx.data", folder / "variants.onnx.variants.json", *own]
    elif contender == "inputs":
        own = [folder / f"a{index}.onnx_adapter" for index in indices]
        files = [folder / "inputs.onnx", folder / "inputs.onnx.data", *own]
    else:
        files = [folder / f"batched{count}.onnx", folder / f"batched{count}.onnx.data"]
    return sum(file.stat().st_size for file in files)


def measured(contender: str, folder: Path, count: int) -> int:
    """Resident bytes of a process that holds ``count`` adapters."""
    command = [sys.executable, "-m", "tests.benchmarks.hundred_adapters", "--measure", contender, str(folder)]
    done = subprocess.run([*command, str(count)], capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--measure"]:
        print(run_all(given[1], Path(given[2]), int(given[3])))
        return
    parser = argparse.ArgumentParser(description="Disk and memory of many adapters over one base.")
    parser.add_argument("workload", choices=[name for name in WORKLOADS if name.startswith("gpt2")])
    parser.add_argument("--counts", default="1,10,100")
    parser.add_argument("--adapter", choices=list(ADAPTERS), default="r=8 on c_attn")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which of them to measure")
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    print(report(**vars(parser.parse_args(given))))


def report(
    workload: str,
    *,
    counts: str = "1,10,100",
    adapter: str = "r=8 on c_attn",
    contenders: str = ",".join(CONTENDERS),
    folder: Path | None = None,
) -> str:
    """The table, as Markdown; the arguments are the command line's."""
    numbers = [int(count) for count in counts.split(",")]
    chosen = [name for name in contenders.split(",") if name != "batched" or "batched" in MODES]
    heads = [f"{what}, MB, {count}" for count in numbers for what in ("disk", "resident")]
    lines = [f"{workload}, {adapter}", "", f"| adapters | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    with tempfile.TemporaryDirectory(prefix="loracc-bench-", dir=folder) as name:
        home = Path(name)
        build(workload, home, numbers, *ADAPTERS[adapter])
        for contender in chosen:
            cells = []
            for count in numbers:
                cells += [disk(contender, home, count) / 1e6, measured(contender, home, count) / 1e6]
            lines.append(f"| {CONTENDERS[contender]} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
