"""A model from read to lowered, on its way to be written: by :func:`loracc.fold`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.binding import bind_adapters, raise_adapters
from loracc.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from loracc.adapter import Adapter
    from loracc.calibration.calibrate import Calibration
    from loracc.job import Job
    from loracc.model import BaseModel
    from loracc.passes.bind_adapter import BindResult
    from loracc.rounding_spec import RoundingSpec

__all__ = ["Lowered", "lower_model", "rounded"]


@dataclass(frozen=True)
class Lowered:
    """A model on its way from bound to written.

    Attributes:
        original: As it was read.
        base: The original, its sites bound.
        model: What is to be written.
        bound: What was folded.
        raised_from: The graph that the deltas were found in, when no adapter was given.
        record: Stamps a model with what it was made from, and ``rounding``; a look at every weight, so it is done
            beside the writing.
        calibration: What came of choosing the rounding; None where that was not asked for.
        rounding: What the record says of it; nothing where all is rounded to nearest, and is to be verified so.
    """

    original: BaseModel
    base: BaseModel
    model: BaseModel
    bound: BindResult
    raised_from: ir.Model | None
    record: Callable[[ir.Model, Mapping[str, str]], None]
    calibration: Calibration | None = None
    rounding: Mapping[str, str] = field(default_factory=dict)


def lower_model(
    model: BaseModel,
    adapters: Sequence[Adapter],
    job: Job,
    maps: Sequence[str],
    allow_unmatched: bool,
    original: str | Path | None,
    facts: dict[str, Any],
) -> Lowered:
    """Bind the adapters, or raise what is in the graph, and fold: lazily, nothing is computed.

    Args:
        model: The model as it was read.
        adapters: None where the LoRA is in its own graph.
        job: Says the dtype.
        maps, allow_unmatched, original: As given to :func:`loracc.fold`.
        facts: What the user said, for the record.

    Raises:
        LoraccError: The adapters do not fit the model.
    """
    from loracc.lower import lower
    from loracc.provenance import Provenance, announce_provenance, identify, read_provenance, stamp_provenance

    previous = read_provenance(model)
    if adapters:
        base, bound = bind_adapters(model, adapters, maps, allow_unmatched, original)
    elif original is None:
        base, bound = raise_adapters(model)
    else:
        raise InputError("--base finds the weights that an adapter is for, and no adapter was given.")
    lowered = lower(base, job.dtype)
    announce_provenance(lowered.ir)

    def record(graph: ir.Model, rounding: Mapping[str, str]) -> None:
        stamp_provenance(
            graph, Provenance.of(identify(model), adapters, bound.bindings, {**facts, **rounding}, previous)
        )

    return Lowered(model, base, lowered, bound, None if adapters else model.ir, record)


@contextmanager
def rounded(lowered: Lowered, spec: RoundingSpec | None, job: Job, traced: Callable[[], Lowered]) -> Iterator[Lowered]:
    """With calibrated rounding, where that was asked for; ``traced`` gives the same model with its computation."""
    if spec is None:
        yield lowered
        return
    from loracc.calibration.fold import calibrated_model

    graph = lowered.model if lowered.model.traced else traced().model
    with calibrated_model(lowered.model, graph, spec, job.progress) as (model, found):
        said = spec.said(found.inputs) if found.tensors else {}
        yield replace(lowered, model=model, calibration=found, rounding=said)
