"""The Python API: read, bind, fold, write, prove; in that order and with nothing moved into place before the proof.

``fold`` is one straight list of steps; each step lives in the module it is called from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.binding import bind_adapters, raise_adapters, read_adapters
from loracc.errors import CheckFailed, InputError
from loracc.fold_result import FoldResult
from loracc.lowered import Lowered, lower_model, rounded
from loracc.recorded import found_inputs, recorded_rounding, said

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.facts import Facts
    from loracc.job import Job
    from loracc.model import BaseModel
    from loracc.progress import Progress
    from loracc.task_data import TaskData
    from loracc.verdict import Verification

__all__ = ["FoldResult", "fold", "load_traced", "split_options", "verify"]

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
        rounding: "nearest", or "calibrated" (:mod:`loracc.calibrate`), which is the default with ``calibrate``.
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
    from loracc.calibrate import check_folds
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
    data = [spec.path] if spec and spec.path else []
    check_reports(reports, [*inputs, *data, job.output])
    check_saving(save_adapter, specs, [*inputs, job.output], force=force or dry_run)
    load, told = split_options(options)
    read = read_adapters(specs, told, combine=combine, density=density, rank=rank, seed=seed)
    with job.base(_load(model, load, graph=job.target.needs_graph)) as loaded:
        chosen = {"combine": combine, "density": density, "rank": rank, "seed": seed, "dtype": dtype}
        facts = said(load, told, maps=maps, allow_unmatched=allow_unmatched, original=original, **chosen)
        facts |= spec.said() if spec else {}

        def lower_again(model_: BaseModel) -> Lowered:
            return lower_model(model_, read, job, maps, allow_unmatched, original, facts)

        lowered = lower_again(loaded)
        if spec is not None:
            check_folds(lowered.model.ir)
        found = lowered.bound.bindings
        with saved_adapter(save_adapter, lowered.base, found, inputs, force=force, dry_run=dry_run):
            try:
                if dry_run:
                    result = _plan(lowered, job)
                else:
                    with rounded(lowered, spec, job, lambda: lower_again(_load(model, load, graph=True))) as ready:
                        result = _write(ready, job, inputs, force=force, verify=verify)
            except CheckFailed as refused:  # nothing was written, and why is what the reports are read for
                _report_fold(reports, FoldResult.refused(job.output, lowered.bound.unmatched, refused), lowered, read)
                raise
            if save_adapter is not None:
                result.saved_adapter = str(save_adapter)
            made = _load(job.output, {}, graph=job.target.needs_graph) if reports and not dry_run else None
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


def verify(
    base: Path_ | None,
    output: Path_,
    adapters: Sequence[Path_] = (),
    *,
    search: Sequence[Path_] = (),
    original: Path_ | None = None,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    combine: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    labels: Path_ | None = None,
    text: Path_ | None = None,
    tokenizer: Path_ | None = None,
    rounding: str | None = None,
    reference: str = "fp32",
    taps: bool = False,
    latency: bool = False,
    provider: str = "cpu",
    threads: int = 0,
    seconds: float = 30.0,
    processes: int = 4,
    margin: float | None = None,
    seed: int = 0,
    reports: Sequence[Path_] = (),
    junit: Path_ | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Verification:
    """Prove that ``output`` is ``base`` with the adapters folded in.

    Args:
        base: The original model; None to find it, and the adapters, by what ``output`` says it was made from.
        output: What was made of it.
        adapters: As given to :func:`fold`. None is needed where the LoRA was found in the base's own graph.
        search: Folders in which to find them.
        original: As given to :func:`fold`.
        combine, density, rank: As given to :func:`fold`.
        rounding: "calibrated" for what was made so and carries no record of it (``.pt2``, ``.safetensors``).
        reference: "fp32": the unfused model in higher precision than the output; "as-trained": in the base's own type.
        labels: ``.npz`` with the right classes ("labels") of the inputs given: accuracy of base, unfused and folded.
        text: Text, a sample a line: perplexity of the three, with the model's own tokenizer or that in ``tokenizer``.
        taps: Also measure the error right after every site.
        latency: Also compare latency with the base.
        provider: What runs the models: "cpu", "cuda", ...
        threads: Threads inside one operator; 0 is the runtime's own choice.
        seconds: Time to spend on latency, over all ``processes``.
        processes: Processes to measure in, one after the other.
        margin: Latency ratios inside 1 ± margin count as equal; 2 % on a CPU and 1 % on a device when None.
        seed: Of the sampled inputs, and of ``combine`` as given to :func:`fold`.
        reports: ``.html``, ``.md`` and ``.json`` files to report to, in that form.
        junit: File to write the verdicts to as JUnit XML.
        options: As for :func:`fold`.

    Raises:
        LoraccError: The input or the call is wrong. A check that says no raises nothing: see ``verdict``.
    """
    from loracc.coverage import coverage_of
    from loracc.formats import parse_adapter_spec
    from loracc.lower import lower
    from loracc.reports.report_body import gathered
    from loracc.reports.report_files import check_reports
    from loracc.targets import target_for
    from loracc.verification import VerifyOptions
    from loracc.verification import verify as judge
    from loracc.verify_plans import are_plans, verify_plans

    if base is None:
        base, adapters, recorded = found_inputs(output, search, adapters, options)
        asked = {
            "labels": labels, "text": text, "tokenizer": tokenizer, "reference": reference, "taps": taps,
            "latency": latency, "provider": provider, "threads": threads, "seconds": seconds, "processes": processes,
            "margin": margin, "seed": seed, "reports": reports, "junit": junit, "progress": progress,
        }  # fmt: skip
        return verify(base, output, adapters, **{**asked, **options, **recorded})
    if search:
        raise InputError("--search finds the base, and one was named.", hint="Leave one of them out.")
    check_reports(reports, [Path(base), Path(output)])
    if junit is not None:
        check_reports([junit], [Path(base), Path(output)], endings=())
    if are_plans(base, output, adapters):
        return _reported(verify_plans(Path(base), Path(output), latency=latency), reports, junit)
    graph = target_for(output).needs_graph
    load, told = split_options(options)
    loaded = _load(base, load, graph=graph)
    made = _load(output, {}, graph=graph)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    read = read_adapters(specs, told, combine=combine, density=density, rank=rank, seed=seed)
    untouched = loaded
    raised_from = None if read else loaded.ir
    if read:
        loaded, bound = bind_adapters(loaded, read, maps, allow_unmatched, original)
    else:
        loaded, bound = raise_adapters(loaded)
    judging = VerifyOptions(
        inputs=dict(loaded.sample_inputs) if load.get("inputs_file") else {},
        task=_task(loaded, labels, text, tokenizer, load),
        truth=reference,
        taps=taps,
        coverage=coverage_of(read, bound.bindings, bound.unmatched, bound.elsewhere),
        raised_from=raised_from,
        calibrated=(rounding or recorded_rounding(made)) == "calibrated",
        seed=seed,
        provider=provider,
        threads=threads,
        latency=latency,
        margin=margin,
        seconds=seconds,
        processes=processes,
    )
    result = judge(loaded, made, bound.bindings, judging, progress)
    facts = gathered(untouched, read, bound.bindings, lower(loaded).ir, made) if reports else None
    return _reported(result, reports, junit, facts)


def _task(
    model: BaseModel, labels: Path_ | None, text: Path_ | None, tokenizer: Path_ | None, load: dict[str, Any]
) -> TaskData | None:
    """What to score, when anything."""
    from loracc.task_data import from_labels, from_text

    if labels is not None and text is not None:
        raise InputError("--labels and --text are two ways to give answers.", hint="Leave one of them out.")
    if tokenizer is not None and text is None:
        raise InputError("--tokenizer means nothing without --text.")
    if (labels is not None or text is not None) and not model.traced:
        raise InputError("a checkpoint has no graph to run, so no task can be scored.", hint="Verify an .onnx.")
    if labels is not None:
        return from_labels(labels, model.sample_inputs if load.get("inputs_file") else {})
    return from_text(text, model, tokenizer) if text is not None else None


def _reported(
    result: Verification, reports: Sequence[Path_], junit: Path_ | None, facts: dict[str, Any] | None = None
) -> Verification:
    """``result``, written to the files that were asked for."""
    from loracc.reports.junit import junit_text
    from loracc.reports.report_body import report_body
    from loracc.reports.report_files import write_reports, write_text

    if reports:
        write_reports(report_body("verify", result.to_json(), facts), reports)
    if junit is not None:
        write_text(junit, junit_text(result.to_json()))
    return result


def _load(path: Path_, load: dict[str, Any], *, graph: bool) -> BaseModel:
    from loracc.model import LoadOptions
    from loracc.sources import load_model

    loaded = load_model(path, LoadOptions(**{**load, "graph": graph}))
    if graph and not loaded.traced:
        state_dict = loaded.format == "state_dict"
        raise InputError(
            f"{path}: only weights ({loaded.format}), and the output needs the computation too.",
            hint="Say what builds its module: --factory package.module:function."
            if state_dict
            else "Give the model's folder with its config.json, or write a checkpoint: -o OUT.safetensors.",
        )
    return loaded


def load_traced(path: Path_, load: dict[str, Any]) -> BaseModel:
    """A model with its graph.

    Raises:
        InputError: It has weights only.
    """
    return _load(path, load, graph=True)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the model's reader, options of the adapters' reader); some are both's."""
    from loracc.formats import AdapterOptions
    from loracc.model import LoadOptions

    load, told = ({f.name for f in fields(cls)} for cls in (LoadOptions, AdapterOptions))
    if unknown := options.keys() - load - told:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    return {k: v for k, v in options.items() if k in load}, {k: v for k, v in options.items() if k in told}


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
        plan.write(job.progress, also=[partial(lowered.record, lowered.model.ir), *facts.jobs()])
        verification = _verify_staged(lowered, stage.path, job) if verify else None
        size = stage.size()
    return _result(lowered, job, facts, verification, stage.files, size)


def _verify_staged(lowered: Lowered, path: Path, job: Job) -> Verification:
    """Judge what was written, where it was written; raise when a check says no."""
    from loracc.verification import VerifyOptions
    from loracc.verification import verify as judge

    made = _load(path, {}, graph=job.target.needs_graph)
    options = VerifyOptions(
        dtype=job.dtype, raised_from=lowered.raised_from, calibrated=lowered.calibration is not None
    )
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
