"""Folding: read, bind, fold, write, prove; in that order and with nothing moved into place before the proof.

``fold`` is one straight list of steps; each step lives in the module it is called from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.binding import read_adapters
from loracc.errors import CheckFailed
from loracc.fold_result import FoldResult
from loracc.loading import load, split_options
from loracc.lowered import Lowered, lower_model, rounded
from loracc.recorded import said

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.facts import Facts
    from loracc.job import Job
    from loracc.model import BaseModel
    from loracc.progress import Progress
    from loracc.proof.verdict import Verification

__all__ = ["FoldResult", "fold"]

Path_ = str | Path


def fold(
    model: Path_,
    adapters: Sequence[Path_] = (),
    output: Path_ = "",
    *,
    original: Path_ | None = None,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    combine: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    rounding: str | None = None,
    calibrate: Path_ | None = None,
    tokenizer: Path_ | None = None,
    external: str = "auto",
    verify: bool = True,
    save_adapter: Path_ | None = None,
    reports: Sequence[Path_] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> FoldResult:
    """Fold adapters into a model's weights and write the result.

    Args:
        model: A model file or folder; its kind is told from its bytes.
        adapters: Files or folders, each optionally ``NAME=PATH`` and ``PATH@WEIGHT``; they add up in this order.
        output: ``.onnx``, ``.pt2``, ``.safetensors`` or a folder; decides what is written.
        original: The checkpoint that the model's graph was made of (``--base``), to find weights that lost their names.
        maps: ``OLD=NEW`` renamings of the adapter's modules.
        allow_unmatched: Report adapter keys that fit nowhere instead of refusing.
        combine: How several adapters become one (:mod:`loracc.combine`); None is their exact sum.
        density, rank, seed: Of ``combine``: see :class:`loracc.combine.CombineOptions`.
        dtype: "fp32", "fp16" or "bf16": dtype of the weights written; the model's own when None.
        rounding: "nearest", or "calibrated" (:mod:`loracc.calibration`), which is the default with ``calibrate``.
        calibrate: ``.npz`` of model inputs or text, a sample a line, to calibrate the rounding with.
        tokenizer: Folder of the tokenizer for that text, where it is not the model's own.
        external: Where an ``.onnx`` keeps its weights: "auto", "inline", "data" or "link".
        verify: Prove the result before it is moved into place.
        save_adapter: Folder to write the LoRA found in the graph to, as a PEFT adapter.
        reports: ``.html``, ``.md`` and ``.json`` files to report to, in that form; also of a check that said no.
        dry_run: Plan only.
        force: Replace the output if it exists.
        progress: Told what is going on; None is silent.
        options: Fields of :class:`loracc.model.LoadOptions` (how to read the model) and of
            :class:`loracc.formats.AdapterOptions` (what an adapter's file does not say, such as ``alpha``).

    Raises:
        LoraccError: The input or the call is wrong (exit code 2 of the command line).
        CheckFailed: What was written is not what was asked for; nothing was moved into place (exit code 1).
    """
    from loracc.formats import parse_adapter_spec
    from loracc.job import Job
    from loracc.reports.report_files import check_reports
    from loracc.rounding_spec import RoundingSpec
    from loracc.save_raised import check_saving, saved_adapter

    job = Job.of(output, dtype, external, progress)
    spec = RoundingSpec.of(rounding, calibrate, tokenizer)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    inputs = [Path(model), *(Path(one.path) for one in specs)]
    job.check(inputs, force=force or dry_run)
    if spec is not None:
        spec.check_target(job.target.name)
    data = [spec.path] if spec and spec.path else []
    check_reports(reports, [*inputs, *data, job.output])
    check_saving(save_adapter, specs, [*inputs, job.output], force=force or dry_run)
    loading, told = split_options(options)
    read = read_adapters(specs, told, combine=combine, density=density, rank=rank, seed=seed)
    with job.base(load(model, loading, graph=job.target.needs_graph)) as loaded:
        chosen = {"combine": combine, "density": density, "rank": rank, "seed": seed, "dtype": dtype}
        facts = said(loading, told, maps=maps, allow_unmatched=allow_unmatched, original=original, **chosen)

        def lower_again(model_: BaseModel) -> Lowered:
            return lower_model(model_, read, job, maps, allow_unmatched, original, facts)

        lowered = lower_again(loaded)
        if spec is not None:
            from loracc.calibration.calibrate import check_folds

            check_folds(lowered.model.ir)
        found = lowered.bound.bindings
        with saved_adapter(save_adapter, lowered.base, found, inputs, force=force, dry_run=dry_run):
            try:
                if dry_run:
                    result = _plan(lowered, job)
                else:
                    with rounded(lowered, spec, job, lambda: lower_again(load(model, loading, graph=True))) as ready:
                        result = _write(ready, job, inputs, force=force, verify=verify)
            except CheckFailed as refused:  # nothing was written, and why is what the reports are read for
                _report_fold(reports, FoldResult.refused(job.output, lowered.bound.unmatched, refused), lowered, read)
                raise
            if save_adapter is not None:
                result.saved_adapter = str(save_adapter)
            made = load(job.output, {}, graph=job.target.needs_graph) if reports and not dry_run else None
            _report_fold(reports, result.to_json(), lowered, read, made)
    return result


def _report_fold(
    reports: Sequence[Path_],
    result: dict[str, Any],
    lowered: Lowered,
    adapters: Sequence[Adapter],
    made: BaseModel | None = None,
) -> None:
    from loracc.reports.report_body import gathered, report_body
    from loracc.reports.report_files import write_reports

    if reports:
        facts = gathered(lowered.original, adapters, lowered.bound.bindings, lowered.model.ir, made)
        write_reports(report_body("fold", result, facts), reports)


def _plan(lowered: Lowered, job: Job) -> FoldResult:
    from loracc.estimate import estimate
    from loracc.lower import folded_tensors

    plan = job.plan(lowered.model, job.output)
    files = [path.name for path in (*plan.small, *(file.path for file in plan.weights))]
    reckoned = estimate(plan, folded_tensors(lowered.model.ir))
    result = _result(lowered, job, _facts(lowered), None, files, plan.nbytes)
    return replace(result, dry_run=True, folded_bytes=plan.folded, estimate=reckoned)


def _write(lowered: Lowered, job: Job, inputs: Sequence[Path], *, force: bool, verify: bool) -> FoldResult:
    with job.staging(inputs, force=force) as stage:
        plan = job.plan(lowered.model, stage.path)
        stage.expected_bytes = plan.nbytes
        facts = _facts(lowered)
        plan.write(job.progress, also=[partial(lowered.record, lowered.model.ir, lowered.rounding), *facts.jobs()])
        verification = _verify_staged(lowered, stage.path, job) if verify else None
        size = stage.size()
    return _result(lowered, job, facts, verification, stage.files, size)


def _verify_staged(lowered: Lowered, path: Path, job: Job) -> Verification:
    """Judge what was written, where it was written; raise when a check says no."""
    from loracc.proof.verification import VerifyOptions
    from loracc.proof.verification import verify as judge

    made = load(path, {}, graph=job.target.needs_graph)
    options = VerifyOptions(dtype=job.dtype, raised_from=lowered.raised_from, calibrated=bool(lowered.rounding))
    result = judge(lowered.base, made, lowered.bound.bindings, options)
    if result.verdict == "fail":
        raise CheckFailed(
            f"{job.output}: the result did not pass its verification, and was not written.\n{result.summary()}",
            verification=result.to_json(),
            hint="An adapter that changes nothing was not trained, or is the wrong file. Anything else is a bug of "
            "loracc's, unless the weights are at their numeric limits; --no-verify writes the output all the same.",
        )
    return result


def _facts(lowered: Lowered) -> Facts:
    from loracc.facts import Facts
    from loracc.lower import folded_tensors

    return Facts(folded_tensors(lowered.model.ir))


def _result(
    lowered: Lowered, job: Job, facts: Facts, verification: Verification | None, files: list[str], nbytes: int
) -> FoldResult:
    chosen = lowered.calibration.notes if lowered.calibration else ()
    return FoldResult(
        output=str(job.output),
        files=files,
        sites=[row.to_json() for row in facts.rows()],
        unmatched=list(lowered.bound.unmatched),
        verification=verification,
        notes=[*lowered.model.notes, *lowered.bound.notes, *facts.notes(), *chosen],
        bytes=nbytes,
        calibration=lowered.calibration.to_json() if lowered.calibration else None,
    )
