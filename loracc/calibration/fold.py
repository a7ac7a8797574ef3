"""``fold --calibrate``: calibrated rounding between lowering and writing, for targets with a graph and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loracc.calibrated import CalibratedTensor
from loracc.calibrated_codes import CalibratedCodes
from loracc.calibration.calibrate import Calibrated, Calibration, calibrate
from loracc.calibration.data import calibration_batches, digest_of
from loracc.dtypes import Array, round_to
from loracc.folded import FoldedTensor
from loracc.model import BaseModel
from loracc.passes.link_biases import follow_weights
from loracc.progress import Progress
from loracc.rounding_spec import RoundingSpec
from loracc.sites import Site
from loracc.tensors import dims

__all__ = ["calibrated_model"]


@contextmanager
def calibrated_model(
    target: BaseModel, traced: BaseModel, spec: RoundingSpec, progress: Progress
) -> Iterator[tuple[BaseModel, Calibration]]:
    """The lowered model with calibrated rounding; to be written inside the block.

    Args:
        target: What is to be written, lowered.
        traced: The same with its computation, lowered with the same adapters; ``target`` itself where that has it.
        spec: What to calibrate with.
        progress: Told how far it is.

    Raises:
        InputError: The data does not fit the model, or the model does not run on it.
    """
    batches = calibration_batches(traced, spec.path, spec.tokenizer, seed=spec.seed)
    with TemporaryDirectory(prefix="loracc-") as scratch:
        folder = Path(scratch)
        found = replace(calibrate(traced.ir, batches, folder, progress=progress), inputs=digest_of(batches))
        if spec.path is None and found.tensors:
            note = "calibration: on made-up inputs; --calibrate FILE with real ones does better."
            found = replace(found, notes=(*found.notes, note))
        yield _applied(target, found.tensors, folder), found


def _applied(target: BaseModel, tensors: Mapping[str, Calibrated], folder: Path) -> BaseModel:
    """A copy of the model with the calibrated values wherever the same deltas are folded."""
    chosen = {
        (binding.adapter, binding.key, binding.site.consumer): (tensor, binding.site)
        for tensor in tensors.values()
        for binding in tensor.bindings
    }
    graph = target.ir.clone()
    for number, value in enumerate(graph.graph.initializers.values()):
        fold = value.const_value
        if isinstance(fold, FoldedTensor) and fold.bindings:
            value.const_value = _with_values(fold, chosen, folder / f"target-{number}")
    follow_weights(graph)
    return replace(target, ir=graph)


def _with_values(fold: FoldedTensor, chosen: Mapping[Any, tuple[Calibrated, Site]], path: Path) -> FoldedTensor:
    pairs: dict[Site, tuple[Calibrated, Site]] = {}
    for binding in fold.bindings:
        found = chosen.get((binding.adapter, binding.key, binding.site.consumer))
        if found is not None:
            pairs[binding.site] = found
    if not pairs:
        return fold
    codes = next((tensor for tensor, _ in pairs.values() if isinstance(tensor, CalibratedCodes)), None)
    if codes is not None:  # of the very graph that is written: nothing else has them
        return codes
    rounded = round_to(fold.exact_rows(0, dims(fold)[0]), fold.dtype)
    gains = {}
    for site, (tensor, there) in pairs.items():
        source: Array = tensor.numpy()
        site.layout.view(rounded)[...] = there.layout.view(source)
        gains[site.name] = tensor.gains[there.name]
    return CalibratedTensor(fold, rounded, path, gains)
