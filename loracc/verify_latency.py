"""Latency of an output against its base, with base against base as the noise floor of the same run.

A block runs A B C C B A: base, output, and a second session of the base. Each block gives one pair B/A and one pair C/A
whose two halves are centred on the same moment, so that a slow drift of the machine (heat, load) cancels.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.runners import OnnxRunner, RunError
from loracc.sample_inputs import check_inputs, draw_inputs, random_inputs
from loracc.sources.user_inputs import read_npz
from loracc.verdict import Latency
from loracc.verify_options import VerifyOptions
from loracc.verify_ratio import Ratio, estimate, rule

__all__ = ["bench_models", "check_latency", "measure"]

#: One timed unit lasts at least this long, so that the clock's and the call's own cost do not count.
_UNIT_SECONDS = 0.002
_FEWEST_BLOCKS, _MOST_BLOCKS = 10, 400
#: Part of the time that goes into warming up.
_WARM = 0.15

Call = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """Median times in milliseconds, and the two ratios."""

    base_ms: float
    output_ms: float
    ratio: Ratio
    noise: Ratio


def check_latency(
    base: BaseModel, out: BaseModel, base_path: Path | None, out_path: Path | None, options: VerifyOptions
) -> Latency:
    """Time both on one set of inputs and rule.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: The user's inputs do not fit the model.
    """
    inputs, _ = draw_inputs(base, seed=options.seed, draws=1, given=options.inputs)
    try:
        base_runner = _runner(base_path or base.ir, options.provider, options.threads)
        calls = [
            base_runner.prepared(inputs[0]),
            _runner(out_path or out.ir, options.provider, options.threads).prepared(inputs[0]),
            _runner(base_path or base.ir, options.provider, options.threads).prepared(inputs[0]),
        ]
        measured = measure(calls[0], calls[1], calls[2], seconds=options.seconds, seed=options.seed)
    except RunError as error:
        return Latency("skipped", f"not measured: {error.message}")
    ruling = rule(measured.ratio, measured.noise, options.margin)
    return Latency(
        ruling.verdict,
        ruling.reason,
        ratio=measured.ratio.value,
        interval=(measured.ratio.low, measured.ratio.high),
        noise_floor=measured.noise.distance,
        margin=options.margin,
        would_pass_at=ruling.would_pass_at,
        pairs=measured.ratio.pairs,
        more_pairs=ruling.more_pairs,
        base_ms=measured.base_ms,
        output_ms=measured.output_ms,
        runner=base_runner.name,
    )


def measure(base: Call, output: Call, again: Call, *, seconds: float, seed: int = 0) -> Measured:
    """Blocks A B C C B A for about ``seconds``, at least ten of them.

    Args:
        base: Runs the base once.
        output: Runs the output once.
        again: Runs another copy of the base once.
        seconds: Time to spend, warm-up included.
        seed: Of the bootstrap.
    """
    calls = (base, output, again)
    repeats = _warm_up(calls, seconds * _WARM)
    end = time.perf_counter() + seconds * (1 - _WARM)
    rows: list[list[float]] = []
    with _no_collection():
        while len(rows) < _FEWEST_BLOCKS or (time.perf_counter() < end and len(rows) < _MOST_BLOCKS):
            forth = [_timed(call, repeats) for call in calls]
            back = [_timed(call, repeats) for call in reversed(calls)]
            rows.append([(one + other) / 2 for one, other in zip(forth, reversed(back), strict=True)])
    a, b, c = np.asarray(rows).T
    return Measured(
        1000 * float(np.median(a)),
        1000 * float(np.median(b)),
        estimate(b, a, seed=seed),
        estimate(c, a, seed=seed),
    )


def bench_models(
    models: Sequence[Path],
    *,
    inputs_file: str | Path | None = None,
    batch: int = 1,
    sequence: int = 128,
    threads: int = 2,
    seconds: float = 20.0,
    margin: float = 0.02,
    provider: str = "cpu",
) -> list[dict[str, Any]]:
    """Every model against the first.

    Args:
        models: ``.onnx`` files that take the same inputs.
        inputs_file: ``.npz`` of inputs by name; seeded random ones when None.
        batch, sequence: Sizes of dynamic axes of random inputs.
        threads: Threads inside one operator.
        seconds: Time to spend on each pair of models.
        margin: Ratios inside 1 ± this count as equal.
        provider: "cpu" or "cuda".

    Returns:
        A row a model: model, median_ms, ratio, interval, noise_floor, margin, verdict, reason, pairs, more_pairs.

    Raises:
        InputError: A model or the inputs cannot be read, or do not fit each other.
        MissingExtraError: onnxruntime is not installed.
    """
    inputs = _bench_inputs(models, inputs_file, batch, sequence)
    first = _runner(models[0], provider, threads).prepared(inputs)
    again = _runner(models[0], provider, threads).prepared(inputs)
    rows: list[dict[str, Any]] = []
    for path in models[1:]:
        found = measure(first, _runner(path, provider, threads).prepared(inputs), again, seconds=seconds)
        ruling = rule(found.ratio, found.noise, margin)
        if not rows:
            rows.append(_row(models[0], found.base_ms, found.noise, found.noise, margin) | {"verdict": "pass"})
        verdict = {"verdict": ruling.verdict, "reason": ruling.reason, "more_pairs": ruling.more_pairs}
        rows.append(_row(path, found.output_ms, found.ratio, found.noise, margin) | verdict)
    return rows


def _row(path: Path, milliseconds: float, ratio: Ratio, noise: Ratio, margin: float) -> dict[str, Any]:
    """The first model's row holds base against base: the noise."""
    return {
        "model": str(path),
        "median_ms": milliseconds,
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "noise_floor": noise.distance,
        "margin": margin,
        "pairs": ratio.pairs,
        "reason": "",
        "more_pairs": None,
    }


def _bench_inputs(
    models: Sequence[Path], inputs_file: str | Path | None, batch: int, sequence: int
) -> Mapping[str, Array]:
    graphs = []
    for path in models:
        if not path.is_file():
            raise InputError(f"{path}: no such file.")
        try:
            graphs.append(ir.load(path))
        except Exception as error:  # protobuf's own exceptions, and onnx_ir's
            raise InputError(f"{path}: not an ONNX model: {error}.") from error
    names = [sorted(str(value.name) for value in graph.graph.inputs) for graph in graphs]
    for path, other in zip(models, names, strict=True):
        if other != names[0]:
            raise InputError(f"{path}: takes {', '.join(other)}, and {models[0]} takes {', '.join(names[0])}.")
    if inputs_file is None:
        return random_inputs(graphs[0], sizes={"batch": batch, "sequence": sequence})
    inputs = read_npz(inputs_file)
    check_inputs(graphs[0], inputs)
    return inputs


def _runner(model: Path | ir.Model, provider: str, threads: int) -> OnnxRunner:
    return OnnxRunner(model, provider=provider, threads=threads, spin=False)


def _warm_up(calls: Sequence[Call], seconds: float) -> int:
    """Run all of them for a while; returns how many runs make a timed unit."""
    end = time.perf_counter() + seconds
    fastest = math.inf
    while True:
        for call in calls:
            fastest = min(fastest, _timed(call, 1))
        if time.perf_counter() > end:
            return max(1, math.ceil(_UNIT_SECONDS / fastest))


def _timed(call: Call, repeats: int) -> float:
    """Seconds a run takes."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collection() -> Any:
    """Python's garbage collector rests while the clock runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
