"""``loracc unfold``: the base that an output was made from, bit for bit.

A folded weight does not hold its base any more: subtracting a delta would leave another rounding behind. So the base is
given, and everything about the pair is checked before it is written out: that it is the base which the output's record
names, that the graphs are the same, that every weight without a delta has the base's bytes; and after writing, that the
file has the base's digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from loracc.model import BaseModel
    from loracc.progress import Progress
    from loracc.provenance import Provenance

__all__ = ["UnfoldResult", "unfold"]


@dataclass(frozen=True)
class UnfoldResult:
    """What was restored.

    Attributes:
        output: The destination.
        files: Names of the files written.
        restored: Initializers that have the base's value again.
        unchanged: How many were found to be the base's already.
        digest: Of the restored weights.
        notes: What the user should know.
        bytes: Size of what was written.
    """

    output: str
    files: list[str]
    restored: list[str]
    unchanged: int
    digest: str
    notes: list[str] = field(default_factory=list)
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def unfold(
    output: str | Path,
    base: str | Path,
    restored: str | Path,
    *,
    external: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> UnfoldResult:
    """Write the base that ``output`` was made from.

    Args:
        output: An ``.onnx`` file or a checkpoint folder made by :func:`loracc.fold`.
        base: The base it was made from.
        restored: Where to write it, as the same kind of file as ``output``.
        external: As for :func:`loracc.fold`.
        force: Replace ``restored`` if it exists.
        progress: Told how far the writing is.
        options: Fields of :class:`loracc.model.LoadOptions`; recorded ones need not be said again.

    Raises:
        InputError: The output has no record, or names another base.
        CheckFailed: The output is not what its record says; nothing was written.
    """
    from loracc.job import Job
    from loracc.model import LoadOptions
    from loracc.provenance import weights_digest
    from loracc.sources import load_model

    job = Job.of(restored, None, external, progress)
    inputs = [Path(output), Path(base)]
    job.check(inputs, force=force)
    graph = job.target.needs_graph
    made = load_model(output, LoadOptions(graph=graph))
    record = _record(made, job.target.name)
    recorded = {key: _tupled(record.options[key]) for key in ("opset", "task", "factory", "dynamic", "inputs")
                if key in record.options}  # fmt: skip
    loaded = load_model(base, LoadOptions(**{**recorded, **options, "graph": graph}))
    _check_base(loaded, record, output)
    changed, unchanged, notes = _compared(loaded, made, record)
    with job.staging(inputs, force=force) as stage:
        plan = job.plan(loaded, stage.path)
        stage.expected_bytes = plan.nbytes
        plan.write(job.progress)
        wanted = weights_digest(loaded.ir)
        digest = weights_digest(load_model(stage.path, LoadOptions(graph=graph)).ir)
        if digest != wanted:
            raise AssertionError(f"{restored}: written with digest {digest}, the base has {wanted}")
        size = stage.size()
    return UnfoldResult(str(restored), stage.files, changed, unchanged, digest, notes, size)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _record(made: BaseModel, target: str) -> Provenance:
    from loracc.provenance import read_provenance

    record = read_provenance(made)
    if record is None:
        raise InputError(
            f"{made.path}: it does not say from what it was made.",
            hint="Only .onnx files and checkpoint folders that loracc folded do.",
        )
    if (target == "onnx") != (made.format == "onnx") or target == "exported_program":
        raise InputError(
            f"{made.path}: it is restored as the kind of file it is.",
            hint="Give -o RESTORED.onnx for an .onnx file, and a folder for a checkpoint's folder.",
        )
    return record


def _check_base(base: BaseModel, record: Provenance, output: str | Path) -> None:
    from loracc.provenance import identify

    found = identify(base)
    if (found.format, found.digest) != (record.base.format, record.base.digest):
        raise InputError(
            f"{base.path}: {output} was not made from it: its weights are {found.digest} ({found.format}), and "
            f"{record.base.digest} ({record.base.format}) is recorded.",
            hint="Give the base that it was made from; loracc inspect OUT shows what is recorded.",
        )


def _compared(base: BaseModel, made: BaseModel, record: Provenance) -> tuple[list[str], int, list[str]]:
    """(weights that change back, how many are the base's already, notes).

    Raises:
        CheckFailed: Something else differs.
    """
    from loracc.proof.structure import compare_checkpoints, compare_graphs
    from loracc.proof.weights import same_bytes

    folded = [str(row["initializer"]) for row in record.sites]
    if "dtype" in record.options:
        note = f"the output was written in {record.options['dtype']}: its other weights could not be compared"
        return list(dict.fromkeys(folded)), 0, [note]
    if base.traced:
        match = compare_graphs(base.ir, made.ir)
    else:
        match = compare_checkpoints(base.ir, made.ir, _untied(base, made, folded))
    ours, theirs = base.ir.graph.initializers, made.ir.graph.initializers
    rest = [pair for pair in match.pairs if pair.base not in folded]
    differ = [
        pair.out
        for pair in rest
        if (one := ours[pair.base].const_value) is None
        or (other := theirs[pair.out].const_value) is None
        or not same_bytes(one, other)
    ]
    problems = [*match.differences[:1], *([f"no delta is recorded for {differ[0]}, and it changed"] if differ else [])]
    if problems:
        raise CheckFailed(
            f"{made.path}: it is not what its record says: {'; '.join(problems)}.",
            verification={"verdict": "fail", "reason": "; ".join(problems)},
            hint="Something changed it after it was folded.",
        )
    return list(dict.fromkeys(folded)), len(rest), []


def _untied(base: BaseModel, made: BaseModel, folded: Sequence[str]) -> dict[str, str]:
    """Tensors that the output has on top of the base's: heads that are no longer tied to a weight that changed."""
    ours, theirs = base.ir.graph.initializers, made.ir.graph.initializers
    return {
        name: origin
        for name, value in theirs.items()
        if name not in ours
        for origin in folded
        if origin in ours and ours[origin].shape == value.shape
    }
