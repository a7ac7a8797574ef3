"""Latency and switching of every way to keep adapters, against the base, in interleaved blocks.

::

    python -m tests.benchmarks.attach_modes gpt2-124m --seconds 20 --processes 4
    python -m tests.benchmarks.attach_modes gpt2-tiny

What is printed is Markdown: per adapter and per size of the input the ratio to the base with its 95 % interval
(``loracc.timing.paired``: blocks A X X A in several processes), and the base against itself as the noise. "batched, n"
is a batch of n rows with n distinct adapters against the base with the same batch. Then what switching costs.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import loracc
from loracc.dtypes import Array
from loracc.proof.ratio import estimate
from loracc.runtime import Deployment
from loracc.switching.modes import MODES
from loracc.timing.job import TimedModel, time_models
from tests.benchmarks.workloads import WORKLOADS, export_base, make_adapter

__all__ = ["main"]

#: Name -> targets and rank.
ADAPTERS: dict[str, tuple[tuple[str, ...], int]] = {
    "r=8 on c_attn": (("c_attn",), 8),
    "r=16 on all linears": (("c_attn", "c_fc", "mlp.c_proj", "attn.c_proj"), 16),
}


@dataclass(frozen=True)
class Contender:
    """A row of the table."""

    name: str
    model: TimedModel
    ids: tuple[int, ...] | None = None


def build(workload: str, folder: Path, targets: tuple[str, ...], rank: int, slots: Sequence[int]) -> Path:
    """The base, and everything that is timed against it, in ``folder``."""
    base = folder / "base.onnx"
    count = max([2, *slots])
    adapters = [
        make_adapter(workload, folder / f"a{index}", targets=targets, rank=rank, seed=str(index))
        for index in range(count)
    ]
    first = str(adapters[0])
    loracc.fold(base, [first], folder / "folded.onnx", verify=False, external="data")
    loracc.attach(base, adapters[:2], folder / "variants.onnx", mode="variants", verify=False, external="data")
    loracc.attach(base, adapters[:2], folder / "inputs.onnx", mode="inputs", verify=False, external="data")
    if "batched" in MODES:
        for size in slots:
            output = folder / f"batched{size}.onnx"
            loracc.attach(base, adapters[:size], output, mode="batched", verify=False, external="data")
    return base


def settings(folder: Path, slots: Sequence[int]) -> Iterator[tuple[int, int, list[Contender]]]:
    """(batch, sequence, what is timed against the base there)."""

    def model(name: str, adapter: str | None = None) -> TimedModel:
        return TimedModel(str(folder / name), adapter=str(folder / adapter) if adapter else None)

    single = [
        Contender("folded", model("folded.onnx")),
        Contender("variants", model("variants.onnx", "variants.onnx.variants/a0.safetensors")),
        Contender("inputs, no adapter", model("inputs.onnx")),
        Contender("inputs, active", model("inputs.onnx", "a0.onnx_adapter")),
    ]
    batched = [size for size in slots if "batched" in MODES]
    for sequence in (16, 128):
        one = [Contender("batched, 1", model("batched1.onnx"), (0,))] if 1 in batched else []
        none = [Contender("batched, no adapter", model("batched1.onnx"), (-1,))] if 1 in batched else []
        yield 1, sequence, [*single, *one, *none]
        for size in batched:
            if size > 1 and size * sequence <= 1024:
                ids = tuple(range(size))
                yield size, sequence, [Contender(f"batched, {size}", model(f"batched{size}.onnx"), ids)]


def feeds(vocabulary: int, batch: int, sequence: int, ids: tuple[int, ...] | None) -> dict[str, Array]:
    """The inputs of one contender."""
    rng = np.random.default_rng(0)
    found = {
        "input_ids": rng.integers(0, vocabulary, (batch, sequence), np.int64),
        "attention_mask": np.ones((batch, sequence), np.int64),
    }
    return found if ids is None else {**found, "adapter_ids": np.array(ids, np.int64)}


def latency_table(workload: str, folder: Path, slots: Sequence[int], seconds: float, processes: int) -> str:
    """Ratios to the base, as Markdown."""
    vocabulary = int(str(WORKLOADS[workload].config["vocab_size"]))
    base = TimedModel(str(folder / "base.onnx"))
    lines = ["| batch × tokens | | ms | ratio to base | 95 % interval |", "|---|---|---|---|---|"]
    for batch, sequence, contenders in settings(folder, slots):
        rows = [*contenders, Contender("base again (noise)", base)]
        inputs = [feeds(vocabulary, batch, sequence, row.ids) for row in rows]
        found, _ = time_models(
            [base, *(row.model for row in rows)],
            [feeds(vocabulary, batch, sequence, None), *inputs],
            seconds=seconds * len(rows),
            processes=processes,
            threads=2,
        )
        for row, blocks in zip(rows, zip(*found, strict=True), strict=True):
            ratio = estimate(blocks)
            median = 1000 * float(np.median(np.concatenate(blocks)[:, 1]))
            cells = (f"{batch} × {sequence}", row.name, f"{median:.3g}", f"{ratio.value:.3f}")
            lines.append(f"| {' | '.join(cells)} | {ratio.low:.3f} to {ratio.high:.3f} |")
    return "\n".join(lines)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def switching_table(folder: Path) -> str:
    """What switching costs, as Markdown: medians, and the most."""
    import onnxruntime

    def activate(adapter: object) -> object:
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        return options

    def load() -> object:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(folder / "a0.onnx_adapter"))
        return adapter

    adapter = load()
    rows = [
        ("inputs: load an .onnx_adapter, once", timed(load, 20)),
        ("inputs: make it the active one of a call", timed(lambda: activate(adapter), 200)),
    ]
    with Deployment(folder / "variants.onnx", capacity=1, threads=2) as deployment:
        names = itertools.cycle(deployment.names)
        rows.append(("variants: first load (fold, open)", timed(lambda: deployment.session(next(names)), 6)))
        last = deployment.loaded[-1]
        rows.append(("variants: one that is loaded", timed(lambda: deployment.session(last), 200)))
    lines = ["| switch | median, ms | most, ms |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * statistics.median(t):.4g} | {1000 * max(t):.4g} |" for name, t in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Latency of every way to switch adapters.")
    parser.add_argument("workload", choices=[name for name in WORKLOADS if name.startswith("gpt2")])
    parser.add_argument("--adapter", choices=list(ADAPTERS), action="append", help="one of them only; repeatable")
    parser.add_argument("--slots", default="1,8,64", help="distinct adapters of the batched graphs")
    parser.add_argument("--seconds", type=float, default=10.0, help="per row of a table")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    options = parser.parse_args(arguments)
    print(report(**vars(options)))


def report(
    workload: str,
    *,
    adapter: Sequence[str] | None = None,
    slots: str = "1,8,64",
    seconds: float = 10.0,
    processes: int = 4,
    folder: Path | None = None,
) -> str:
    """All tables of one workload, as Markdown; the arguments are the command line's."""
    sizes = [int(size) for size in slots.split(",") if size]
    parts = []
    with tempfile.TemporaryDirectory(prefix="loracc-bench-", dir=folder) as name:
        base = export_base(workload, Path(name) / "base.onnx")
        for title in adapter or ADAPTERS:
            home = Path(name) / title.split()[0]
            home.mkdir()
            for file in base.parent.glob("base.onnx*"):
                (home / file.name).hardlink_to(file)
            build(workload, home, *ADAPTERS[title], sizes)
            parts.append(f"{workload}, {title}, two threads, {processes} processes")
            parts.append(latency_table(workload, home, sizes, seconds, processes))
            parts.append(switching_table(home))
            shutil.rmtree(home)
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
