"""Verification as the command line and the Python API ask for it: read both models, bind, judge, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loracc.binding import bind_adapters, raise_adapters, read_adapters
from loracc.errors import InputError
from loracc.loading import load, split_options
from loracc.recorded import found_inputs, recorded_rounding

if TYPE_CHECKING:
    from loracc.model import BaseModel
    from loracc.progress import Progress
    from loracc.proof.verdict import Verification
    from loracc.task_data import TaskData

__all__ = ["verify"]

Path_ = str | Path


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
        rounding: "calibrated" for what was made so and carries no record of it (a ``.safetensors`` file).
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
    from loracc.formats import parse_adapter_spec
    from loracc.lower import lower
    from loracc.proof.coverage import coverage_of
    from loracc.proof.plans import are_plans, verify_plans
    from loracc.proof.verification import VerifyOptions
    from loracc.proof.verification import verify as judge
    from loracc.reports.report_body import gathered
    from loracc.reports.report_files import check_reports
    from loracc.targets import target_for

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
    loading, told = split_options(options)
    loaded = load(base, loading, graph=graph)
    made = load(output, {}, graph=graph)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    read = read_adapters(specs, told, combine=combine, density=density, rank=rank, seed=seed)
    with _as_output(loaded, made) as loaded:
        untouched = loaded
        raised_from = None if read else loaded.ir
        if read:
            loaded, bound = bind_adapters(loaded, read, maps, allow_unmatched, original)
        else:
            loaded, bound = raise_adapters(loaded)
        calibrated = (rounding or recorded_rounding(made)) == "calibrated"
        judging = VerifyOptions(
            inputs=dict(loaded.sample_inputs) if loading.get("inputs_file") else {},
            task=_task(loaded, labels, text, tokenizer, loading),
            truth=reference,
            taps=taps,
            coverage=coverage_of(read, bound.bindings, bound.unmatched, bound.elsewhere),
            raised_from=raised_from,
            calibrated=calibrated,
            beside_nearest=calibrated,
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


@contextmanager
def _as_output(base: BaseModel, made: BaseModel) -> Iterator[BaseModel]:
    """The base by the way of the output: two ways of tracing one model may read a size from another input."""
    if made.format != "exported_program":
        yield base
        return
    from loracc.targets.exported_program import saved_program

    with TemporaryDirectory(prefix="loracc-") as folder, saved_program(base, Path(folder, "base.pt2")) as saved:
        yield saved


def _task(
    model: BaseModel, labels: Path_ | None, text: Path_ | None, tokenizer: Path_ | None, loading: dict[str, Any]
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
        return from_labels(labels, model.sample_inputs if loading.get("inputs_file") else {})
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
