"""Many threads that switch variants at random: is every output right, and does the memory stay?

::

    python -m tests.benchmarks.switching_soak --seconds 60

A base of 2 x 4 MB weights and more variants than are kept loaded: they are folded, opened, dropped and freed all
the time. Every output is compared, bit for bit, with what plain ONNX Runtime computed from the folded model's own file.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import loracc
from loracc.dtypes import Array
from loracc.runtime import Deployment
from tests.runtime.deployments import adapter, attach_variants, base

__all__ = ["Soak", "main", "prepare", "resident_bytes", "soak"]

_SAMPLE_SECONDS = 0.25


@dataclass
class Soak:
    """What happened.

    Attributes:
        calls: How many outputs were compared.
        wrong: Which of them were not equal, as (variant, largest difference).
        loads: How often a variant was folded and opened.
        resident: The process's memory over the time, in bytes.
    """

    calls: int = 0
    wrong: list[tuple[str | None, float]] = field(default_factory=list)
    loads: int = 0
    resident: list[int] = field(default_factory=list)

    def growth(self) -> float:
        """Bytes a second between the median of the second and of the last quarter of the samples."""
        quarter = len(self.resident) // 4
        first, last = np.median(self.resident[quarter : 2 * quarter]), np.median(self.resident[-quarter:])
        return float(last - first) / (2 * quarter * _SAMPLE_SECONDS)


def prepare(folder: Path, variants: int, *, width: int = 512, inner: int = 2048) -> dict[str | None, Array]:
    """A deployment ``out.onnx`` in ``folder``; what every variant computes on :func:`inputs`."""
    import onnxruntime

    model = base(folder, width=width, inner=inner)
    expected: dict[str | None, Array] = {}
    names: list[str | None] = [None, *(f"v{index}" for index in range(variants))]
    for seed, name in enumerate(names):
        file = model
        if name is not None:
            adapter(folder / name, seed=seed, width=width, inner=inner)
            file = folder / f"{name}.onnx"
            loracc.fold(model, [folder / name], file, verify=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        expected[name] = session.run(None, inputs(width))[0]
        if name is not None:
            file.unlink()
    attach_variants(model, [str(folder / name) for name in names if name], folder / "out.onnx", verify=False)
    return expected


def inputs(width: int) -> dict[str, Array]:
    """What is run all the time."""
    return {"x": np.random.default_rng(5).standard_normal((4, width)).astype(np.float32)}


def soak(path: Path, expected: dict[str | None, Array], *, seconds: float, threads: int, capacity: int) -> Soak:
    """Switch at random for a while."""
    found, lock, names = Soak(), threading.Lock(), list(expected)
    feed = inputs(next(iter(expected.values())).shape[1])
    opened: list[object] = []
    with Deployment(path, capacity=capacity, threads=1, configure=opened.append) as deployment:
        end = time.monotonic() + seconds

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                name = rng.choice(names)
                got = deployment.run(name, feed)["y"]
                same = np.array_equal(got, expected[name])
                with lock:
                    found.calls += 1
                    if not same:
                        found.wrong.append((name, float(np.abs(got - expected[name]).max())))

        with ThreadPoolExecutor(threads) as pool:
            going = [pool.submit(work, seed) for seed in range(threads)]
            while time.monotonic() < end:
                time.sleep(_SAMPLE_SECONDS)
                found.resident.append(resident_bytes())
                found.loads, opened[:] = found.loads + len(opened), []
            for one in going:
                one.result()
    return found


def resident_bytes() -> int:
    """The process's resident memory."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell VmRSS")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Switch variants at random in many threads.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--variants", type=int, default=12)
    parser.add_argument("--capacity", type=int, default=4)
    print(report(**vars(parser.parse_args(arguments))))


def report(*, seconds: float = 60.0, threads: int = 8, variants: int = 12, capacity: int = 4) -> str:
    """What a soak found, in two lines.

    Raises:
        SystemExit: An output was wrong.
    """
    with tempfile.TemporaryDirectory(prefix="loracc-soak-") as name:
        expected = prepare(Path(name), variants)
        found = soak(Path(name) / "out.onnx", expected, seconds=seconds, threads=threads, capacity=capacity)
    if found.wrong:
        raise SystemExit(f"wrong outputs: {found.wrong[:5]}")
    quarter = len(found.resident) // 4
    medians = [np.median(found.resident[i * quarter : (i + 1) * quarter]) / 1e6 for i in range(4)]
    return (
        f"{threads} threads, {variants} variants and the base, {capacity} kept, {seconds:g} s: {found.calls:,} outputs "
        f"compared, {len(found.wrong)} wrong, {found.loads:,} loads\n"
        f"resident memory, MB, median of each quarter: {' '.join(f'{value:.0f}' for value in medians)}; "
        f"growth {found.growth() / 1e6:+.3f} MB/s; most {max(found.resident) / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
