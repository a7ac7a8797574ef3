"""``loracc.attach``: read, bind each adapter by itself, and let the mode make the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import CheckFailed, InputError
from loracc.fold_result import FoldResult
from loracc.switching.modes import MODES, maker

if TYPE_CHECKING:
    from loracc.progress import Progress
    from loracc.switching.request import AttachRequest, AttachResult

__all__ = ["attach"]

Path_ = str | Path


def attach(
    model: Path_,
    adapters: Sequence[Path_],
    output: Path_,
    *,
    mode: str = "inputs",
    sums: Sequence[str] = (),
    slots: int | None = None,
    rank: int | None = None,
    backend: str | None = None,
    max_batch: int | None = None,
    profiles: Sequence[str] = (),
    original: Path_ | None = None,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    dtype: str | None = None,
    external: str = "auto",
    verify: bool = True,
    reports: Sequence[Path_] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> AttachResult:
    """Keep adapters beside a model's weights, to be switched at run time.

    Args:
        model: A model file or folder, as for :func:`loracc.fold`.
        adapters: Files or folders, each optionally ``NAME=PATH`` and ``PATH@WEIGHT``; each stays one of its own.
        output: An ``.onnx`` file; what else the mode writes goes beside it; a folder with "triton". With "variants" and
            the graph of a deployment as model and output, the adapters are added to it. An ``.onnx_adapter`` where
            ``model`` is a graph of "inputs": the adapters' exact sum is written for it, and the graph left as it is.
        mode: A name of :data:`loracc.switching.modes.MODES`.
        sums: "inputs": further adapters that are exact sums of the given ones, ``NAME=a+b@0.5``.
        slots: "batched": how many places for adapters; as many as adapters when None.
        backend, max_batch, profiles: "triton": see :class:`loracc.switching.triton_config.TritonSettings`.
        rank: "batched": room in each place; what the adapters need when None.
        original, maps, allow_unmatched, dtype, external, reports, dry_run, force, progress, options: As for
            :func:`loracc.fold`.
        verify: Prove the result before it is moved into place: with each adapter the numbers of the unfused model,
            without one the base's bits, and but for the branches the base's graph.

    Raises:
        LoraccError: The input or the call is wrong (exit code 2 of the command line).
        CheckFailed: What was written is not what was asked for; nothing was moved into place (exit code 1).
    """
    from loracc.binding import bind_each_by_content, read_adapters
    from loracc.formats import parse_adapter_spec
    from loracc.job import Job
    from loracc.loading import load_traced, split_options
    from loracc.reports.report_files import check_reports
    from loracc.switching.one_more import OneMore, write_one_more
    from loracc.switching.request import AttachRequest, Bound
    from loracc.switching.variants import add_variants, adds_to

    given = {"sums": sums, "slots": slots, "rank": rank}
    given |= {"backend": backend, "max_batch": max_batch, "profiles": profiles}
    _check_call(mode, adapters, output, given)
    if adds_to(mode, model, output):
        if original is not None:
            raise InputError(f"--base: {model} records what its weights are called.", hint="Leave it out.")
        if dtype is not None or external != "auto":
            raise InputError(f"--dtype, --data-layout: {model} is there already, and keeps its weights as they are.")
        asked = {"maps": maps, "allow_unmatched": allow_unmatched, "verify": verify, "force": force, **options}
        check_reports(reports, [Path(output)])
        result = add_variants(output, adapters, dry_run=dry_run, **asked)
        _report(reports, result.to_json())
        return result
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    inputs = (Path(model), *(Path(spec.path) for spec in specs))
    load, told = split_options(options)
    read = read_adapters(specs, told, combine=None, density=None, rank=None, seed=0)
    if Path(output).suffix.lower() == ".onnx_adapter":
        check_reports(reports, [*inputs, Path(output)])
        asked = {"--sum": sums, "--dtype": dtype, "--base": original, "--as": mode != "inputs" and mode}
        if refused := [option for option, value in asked.items() if value]:
            raise InputError(
                f"{', '.join(refused)}: means nothing to an .onnx_adapter, which is for a graph of --as inputs that is "
                "there; several adapters add up in it."
            )
        call = OneMore(Path(model), Path(output), verify, force, dry_run)
        more = write_one_more(call, load_traced(model, load), read, maps, allow_unmatched)
        _report(reports, more.to_json())
        return more
    job = Job.of(output, dtype, external, progress)
    job.check(inputs, force=force or dry_run)
    check_reports(reports, [*inputs, job.output])
    base = load_traced(model, load)
    base, found = bind_each_by_content(base, read, maps, allow_unmatched, original)
    bound = tuple(Bound(*pair) for pair in zip(read, found, strict=True))
    request = AttachRequest(
        base=base,
        bound=bound,
        job=job,
        inputs=inputs,
        sums=tuple(sums),
        slots=slots,
        rank=rank,
        backend=backend,
        max_batch=max_batch,
        profiles=tuple(profiles),
        verify=verify,
        force=force,
        dry_run=dry_run,
    )
    try:
        result = maker(mode)(request)
    except CheckFailed as refused:  # nothing was written, and why is what the reports are read for
        unmatched = request.unmatched
        _report(reports, {**FoldResult.refused(job.output, unmatched, refused), "mode": mode, "adapters": []}, request)
        raise
    _report(reports, result.to_json(), request, written=not dry_run)
    return result


def _report(
    reports: Sequence[Path_], result: dict[str, Any], request: AttachRequest | None = None, *, written: bool = False
) -> None:
    from loracc.loading import load_traced
    from loracc.reports.report_body import gathered, report_body
    from loracc.reports.report_files import write_reports

    if not reports:
        return
    facts = None
    if request is not None:
        bindings = [binding for one in request.bound for binding in one.bindings]
        output = request.job.output
        made = load_traced(output, {}) if written and output.suffix.lower() == ".onnx" else None
        facts = gathered(request.base, [one.adapter for one in request.bound], bindings, made=made)
    write_reports(report_body("attach", result, facts), reports)


def _check_call(mode: str, adapters: Sequence[Path_], output: Path_, given: dict[str, Any]) -> None:
    if mode not in MODES:
        raise InputError(f"--as {mode}: no such way of switching.", hint=f"There are {', '.join(MODES)}.")
    if not adapters:
        raise InputError(
            "no adapter was given.", hint="Name one or more after the model: loracc attach MODEL ADAPTER -o OUT.onnx"
        )
    if MODES[mode].folder:
        if Path(output).suffix.lower() in (".onnx", ".pt2", ".safetensors"):
            raise InputError(f"{output}: --as {mode} writes a folder.", hint="Name one with -o.")
    elif Path(output).suffix.lower() not in (".onnx", ".onnx_adapter"):
        raise InputError(
            f"{output}: attach writes .onnx files (and .onnx_adapter files for a graph that it wrote before).",
            hint="Name the output OUT.onnx.",
        )
    for option, value in given.items():
        if value and option not in MODES[mode].options:
            takers = [name for name, known in MODES.items() if option in known.options]
            name = {"sums": "--sum", "profiles": "--profile"}.get(option, f"--{option.replace('_', '-')}")
            raise InputError(f"{name} means nothing to --as {mode}.", hint=f"It belongs to --as {', '.join(takers)}.")
