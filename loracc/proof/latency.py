"""Latency of an output against its base, and a second copy of the base against it as the noise floor."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.model import BaseModel
from loracc.progress import Progress
from loracc.proof.options import VerifyOptions
from loracc.proof.ratio import estimate, rule
from loracc.proof.verdict import Latency
from loracc.runners.runner import RunError
from loracc.sample_inputs import draw_inputs
from loracc.timing.job import TimedModel, time_models
from loracc.timing.paired import Blocks

__all__ = ["MARGINS", "check_latency", "judged"]

#: What counts as equal where nobody said: clocks of devices are steadier than a CPU that others use too.
MARGINS: Mapping[str, float] = {"cpu": 0.02}
_DEVICE_MARGIN = 0.01


def check_latency(
    base: BaseModel,
    out: BaseModel,
    base_path: Path | None,
    out_path: Path | None,
    options: VerifyOptions,
    progress: Progress | None = None,
) -> Latency:
    """Time both on one set of inputs and rule.

    Args:
        base, out: The models.
        base_path, out_path: Their files, where the runtime reads them as they are; else a temporary one is written.
        options: ``seconds``, ``processes``, ``margin``, ``provider``, ``threads``, ``inputs``, ``seed``.
        progress: Told of every process.

    Raises:
        MissingExtraError: The runtime is not installed.
        InputError: The user's inputs do not fit the model.
    """
    inputs, _ = draw_inputs(base, seed=options.seed, draws=1, given=options.inputs)
    with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
        try:
            files = [
                path or _written(model.ir, Path(folder) / name)
                for path, model, name in ((base_path, base, "base.onnx"), (out_path, out, "out.onnx"))
            ]
            found, names = time_models(
                [TimedModel(str(path.absolute()), options.provider) for path in (files[0], files[1], files[0])],
                [inputs[0]] * 3,
                seconds=options.seconds,
                processes=options.processes,
                threads=options.threads,
                progress=progress,
            )
        except RunError as error:
            return Latency("skipped", f"not measured: {error.message}")
    return judged(found, margin_of(options.margin, options.provider), seed=options.seed, runner=names[0])


def margin_of(margin: float | None, provider: str) -> float:
    """The user's margin, or the provider's."""
    return MARGINS.get(provider, _DEVICE_MARGIN) if margin is None else margin


def judged(processes: Sequence[Blocks], margin: float, *, seed: int = 0, runner: str = "") -> Latency:
    """The verdict on measurements.

    Args:
        processes: For each process the blocks of the output and those of the second copy of the base.
        margin: Ratios inside 1 ± margin count as equal.
        seed: Of the bootstrap.
        runner: What measured.
    """
    output, again = ([blocks[index] for blocks in processes] for index in (0, 1))
    ratio, noise = estimate(output, seed=seed), estimate(again, seed=seed)
    ruling = rule(ratio, noise, margin)
    return Latency(
        ruling.verdict,
        ruling.reason,
        ratio=ratio.value,
        interval=(ratio.low, ratio.high),
        interval_90=(ratio.low90, ratio.high90),
        noise_ratio=noise.value,
        noise_interval=(noise.low, noise.high),
        noise_floor=noise.distance,
        margin=margin,
        would_pass_at=ruling.would_pass_at,
        pairs=ratio.pairs,
        processes=len(processes),
        more_pairs=ruling.more_pairs,
        base_ms=_milliseconds(output, 0),
        output_ms=_milliseconds(output, 1),
        runner=runner,
        samples=tuple(_samples(blocks) for blocks in output),
        noise_samples=tuple(_samples(blocks) for blocks in again),
    )


def _milliseconds(processes: Sequence[Array], column: int) -> float:
    return 1000 * float(np.median(np.concatenate([blocks[:, column] for blocks in processes])))


def _samples(blocks: Array, most: int = 200) -> tuple[tuple[float, float], ...]:
    """Some of the pairs, evenly spread, in milliseconds: for a report's picture."""
    chosen = blocks[np.linspace(0, len(blocks) - 1, min(most, len(blocks))).astype(int)]
    return tuple((round(1000 * float(a), 6), round(1000 * float(b), 6)) for a, b in chosen)


def _written(model: ir.Model, path: Path) -> Path:
    """A model that was no ``.onnx`` file, as one; its weights are streamed."""
    from loracc.targets.onnx_file import write_onnx

    write_onnx(model, path)
    return path
