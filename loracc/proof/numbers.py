"""End to end: the folded graph against y = W·x + s·B·(A·x) of the original base, in higher precision (DESIGN.md 5).

Two errors are measured against that reference: the folded model's, run as it was written, and the unfused model's, run
in the output's own type. The second is what the type costs anyway. Per output, the fold passes when

    error of the folded model <= max(multiple · error of the unfused model, floor · unit roundoff)

and the check as a whole only counts when it could have failed: the adapter must change some output by more than the
noise of the reference's own arithmetic, and the outputs must be finite and not constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, unit_roundoff
from loracc.encodings.decoded import DecodedTensor
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.model import BaseModel
from loracc.proof.encoded import same_parts
from loracc.proof.graphs import (
    FLOATS,
    Prepared,
    as_written,
    beside_encoded,
    in_own_type,
    in_reference,
    rounded_at_random,
    rounded_to_nearest,
    with_outputs,
)
from loracc.proof.memory import available_memory, weights_in
from loracc.proof.metrics import CACHE, Outputs, further_metrics, is_float_array, relative_error, relative_l2
from loracc.proof.options import VerifyOptions
from loracc.proof.structure import Match
from loracc.proof.task import task_scores
from loracc.proof.verdict import EndToEnd, OutputError, SiteError
from loracc.random_nodes import random_nodes
from loracc.runners.runner import RunError
from loracc.sample_inputs import draw_inputs

__all__ = ["check_end_to_end"]

#: The reference's own noise, in its unit roundoffs: an adapter must do more than this.
_NOISE = 16.0
#: A model in memory: the weights as they are handed over, and as the runtime packs them.
_COPIES = 2


@dataclass(frozen=True)
class _Case:
    """Everything one comparison needs."""

    base: BaseModel
    out: BaseModel
    path: Path | None
    match: Match
    bindings: Sequence[Binding]
    options: VerifyOptions
    own: ir.DataType
    reference: ir.DataType
    made: Prepared | None = None


def check_end_to_end(
    base: BaseModel,
    out: BaseModel,
    path: Path | None,
    match: Match,
    bindings: Sequence[Binding],
    options: VerifyOptions,
    made: Prepared | None = None,
) -> EndToEnd:
    """Run reference, unfused and folded model on the same inputs and compare.

    Args:
        base: The original model; its ``ir`` has its own dtypes and no deltas.
        out: What was written, loaded.
        path: The file to run where the runtime reads it itself; else ``out.ir`` is run.
        match: Which initializers and values of the two graphs belong together.
        bindings: The deltas, at sites of the base.
        options: Inputs, tolerance, provider.
        made: How to run the output, where that is not simply as it was written (a graph with switchable deltas).

    Returns:
        The verdict; skipped, with the reason, when the models cannot be run here or compute something random.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: The user's inputs do not fit the model.
    """
    if not base.traced or not out.traced:
        return EndToEnd("skipped", "a checkpoint has no graph to run")
    if random := random_nodes(base.ir):
        # Two runs differ by what was drawn: a tolerance from one of them could not fail.
        return EndToEnd("skipped", f"{random[0].op_type} {random[0].name!r} draws at random: no two runs are alike")
    own = _own_dtype(out.ir, match, bindings)
    wide = ir.DataType.DOUBLE if own in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else ir.DataType.FLOAT
    case = _Case(base, out, path, match, bindings, options, own, wide, made)
    if (reason := _too_large(case)) is not None:
        return EndToEnd("skipped", reason)
    try:
        if options.task is not None:
            inputs, origin = [dict(one) for one in options.task.inputs], "the inputs that have answers"
        else:
            inputs, origin = draw_inputs(base, seed=options.seed, draws=options.draws, given=options.inputs)
    except InputError as error:
        if options.inputs:
            raise
        return EndToEnd("skipped", error.message)
    result = _compare(case, inputs)
    return replace(result, draws=origin, dtype=own.name.lower(), reference=wide.name.lower())


def _own_dtype(out: ir.Model, match: Match, bindings: Sequence[Binding]) -> ir.DataType:
    """The least precise type among the bound weights of the output: what its numbers cost."""
    bound = {binding.site.initializer for binding in bindings}
    tensors = [out.graph.initializers[pair.out].const_value for pair in match.pairs if pair.base in bound]
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype in FLOATS]
    return max(dtypes, key=unit_roundoff, default=ir.DataType.FLOAT)


def _too_large(case: _Case) -> str | None:
    free = available_memory()
    needed = _COPIES * weights_in(case.base.ir, case.reference)
    if free is None or needed <= case.options.memory_share * free:
        return None
    share = 100 * case.options.memory_share
    return (
        f"the reference in {case.reference.name.lower()} takes about {needed / 1e9:.3g} GB, "
        f"more than {share:g} % of the {free / 1e9:.3g} GB that are free"
    )


def _compare(case: _Case, inputs: list[dict[str, Array]]) -> EndToEnd:
    """Run the four models one after the other (one is in memory at a time), and judge."""
    options, graph = case.options, case.base.ir
    plain = in_reference(graph, (), case.reference)
    try:
        base = _run(plain, inputs, options)
    except RunError as error:
        if options.inputs or case.base.sample_inputs:
            return EndToEnd("skipped", f"the base itself does not run here: {error.message}")
        return EndToEnd("skipped", f"the base does not run on made-up inputs ({error.message}); give it some: --inputs")
    source, branches = (options.raised_from, ()) if options.raised_from else (graph, case.bindings)
    unfused = in_reference(source, branches, case.reference)
    try:
        reference = _run(unfused, inputs, options)
    except RunError as error:
        return EndToEnd("skipped", f"the reference does not run here: {error.message}", notes=unfused.notes)
    if (reason := _no_signal(reference)) is not None:
        return EndToEnd("fail", reason, notes=unfused.notes)
    cost = _cost(case, source, branches)
    folded = case.made or as_written(case.path or case.out.ir, case.out.ir)
    notes = tuple(dict.fromkeys((*unfused.notes, *cost.notes, *folded.notes)))
    try:
        own = _run(cost, inputs, options)
    except RunError as error:
        return EndToEnd("skipped", f"the base does not run in its own type here: {error.message}", notes=notes)
    try:
        made = _run(folded, inputs, options)
    except RunError as error:
        if _runs(as_written(graph, graph), inputs, options):
            return EndToEnd("fail", f"the output does not run, and the base does: {error.message}", notes=notes)
        notes += (f"neither the base nor the output runs here as it is, so the output was emulated: {error.message}",)
        emulated = in_own_type(case.out.ir, ())
        if not _runs(emulated, inputs, options):
            return EndToEnd("skipped", f"the base does not run here as it is: {error.message}", notes=notes)
        made = _run(emulated, inputs, options)
    wrapped = any("float32" in note for note in unfused.notes)
    noise = _NOISE * unit_roundoff(ir.DataType.FLOAT if wrapped else case.reference)
    result = _judge(reference, base, own, made, case, noise)
    result = replace(result, notes=(*notes, *_blind(result)))
    if options.beside_nearest:
        result = replace(result, rounding=_roundings(case, inputs, reference, made))
    if options.task is not None:
        runs = {"base": base, "unfused": own, "folded": made}
        result = replace(result, task=task_scores(runs, options.task.labels))
    wrong = (result.verdict == "fail" or options.taps) and result.effect and case.made is None
    return _localised(case, result, inputs[:1]) if wrong else result


def _roundings(case: _Case, inputs: list[dict[str, Array]], reference: Outputs, made: Outputs) -> dict[str, float]:
    """What calibrated rounding did for the outputs; nothing where the other fold does not run."""
    nearest = rounded_to_nearest(case.base, case.bindings, case.options.dtype)
    try:
        plain = _run(nearest, inputs, case.options)
    except RunError:
        return {}
    floats = [name for name, value in reference[0].items() if is_float_array(value)]
    names = [name for name in floats if not name.startswith(CACHE)] or floats
    found = {}
    for word, outputs in (("nearest", plain), ("calibrated", made)):
        pairs = [([draw[name] for draw in outputs], [draw[name] for draw in reference]) for name in names]
        found[word] = max((relative_l2(ours, truth) for ours, truth in pairs), default=0.0)
    return found


def _cost(case: _Case, source: ir.Model, branches: Sequence[Binding]) -> Prepared:
    """The unfused model as the output's own type has it.

    Where quantized weights changed: the deltas in them, rounded on the same grids, at random and not to nearest: what
    such a grid costs anyway. Where they did not, the deltas beside them.
    """
    ours, theirs = case.base.ir.graph.initializers, case.out.ir.graph.initializers
    bound = {binding.site.initializer for binding in case.bindings}
    tensors = [(ours[pair.base].const_value, theirs[pair.out].const_value) for pair in case.match.pairs
               if pair.base in bound]  # fmt: skip
    changes = [
        not same_parts(before, after)
        for before, after in tensors
        if isinstance(before, DecodedTensor) and isinstance(after, DecodedTensor)
    ]
    if any(changes):
        return rounded_at_random(case.base, case.bindings, case.options.seed)
    return beside_encoded(source, branches) if changes else in_own_type(source, branches, case.options.dtype)


def _run(prepared: Prepared, inputs: list[dict[str, Array]], options: VerifyOptions) -> list[dict[str, Array]]:
    return prepared.run(inputs, options)


def _runs(prepared: Prepared, inputs: list[dict[str, Array]], options: VerifyOptions) -> bool:
    try:
        _run(prepared, inputs, options)
    except RunError:
        return False
    return True


def _no_signal(reference: Outputs) -> str | None:
    """Why the reference's outputs could not tell a right model from a wrong one."""
    names = list(reference[0])
    arrays = {name: [draw[name] for draw in reference] for name in names}
    floats = {name: values for name, values in arrays.items() if is_float_array(values[0])}
    for name, values in floats.items():
        if any(np.isnan(value.astype(np.float64)).any() for value in values):
            return f"no signal: output {name!r} of the reference holds NaN"
    if all(_constant(values) for values in arrays.values()):
        return "no signal: every output of the reference is constant"
    return None


def _constant(values: Sequence[Array]) -> bool:
    flat = np.concatenate([value.ravel() for value in values])
    return bool((flat == flat[0]).all()) if flat.size else True


def _judge(reference: Outputs, base: Outputs, own: Outputs, made: Outputs, case: _Case, noise: float) -> EndToEnd:
    missing = [name for name in reference[0] if name not in made[0]]
    if missing:
        return EndToEnd("fail", f"the output model does not give {', '.join(missing)}")
    floor = case.options.floor * unit_roundoff(case.own)
    rows = []
    for name in reference[0]:
        truth, ours, theirs, before = ([draw[name] for draw in draws] for draws in (reference, made, own, base))
        unfused = relative_error(theirs, truth)
        multiple = case.options.multiple
        if case.options.truth == "as-trained":  # as far off as the trainer's own roundings are, and the output's
            truth, multiple = theirs, multiple + 1.0
        rows.append(
            OutputError(
                name=name,
                folded=relative_error(ours, truth),
                unfused=unfused,
                effect=relative_error(before, truth),
                relative_l2=relative_l2(ours, truth) if is_float_array(truth[0]) else 0.0,
                # Overflow in the output's own type is no licence to be wrong.
                tolerance=max(multiple * unfused, floor) if math.isfinite(unfused) else floor,
                more=further_metrics(name, ours, truth),
            )
        )
    worst = max(rows, key=lambda row: row.folded / row.tolerance)
    effect = max(row.effect for row in rows)
    failed = [row for row in rows if not row.folded <= row.tolerance]
    reason = ""
    if effect <= noise:
        reason = f"no signal: the adapter changes the outputs by {effect:.3g}, not more than the noise of {noise:.3g}"
    elif failed:
        reason = f"output {worst.name!r} is off by {worst.folded:.3g}, {worst.tolerance:.3g} is allowed"
    return EndToEnd(
        "fail" if reason else "pass",
        reason,
        max_relative_error=worst.folded,
        tolerance=worst.tolerance,
        would_pass_at=max((row.folded / row.unfused for row in failed if row.unfused), default=None),
        multiple=case.options.multiple,
        floor=floor,
        effect=effect,
        noise_floor=noise,
        outputs=tuple(rows),
    )


def _blind(result: EndToEnd) -> tuple[str, ...]:
    """What to say where the base itself would have passed: a weak adapter, and a type or a grid that costs more."""
    if result.verdict != "pass" or any(row.effect > row.tolerance for row in result.outputs):
        return ()
    return (
        f"the adapter changes the outputs by {result.effect:.3g}, and {result.tolerance:.3g} is allowed: end to end, a "
        "lost adapter would not be seen; that nothing is lost, the comparison of the weights says",
    )


def _localised(case: _Case, result: EndToEnd, inputs: list[dict[str, Array]]) -> EndToEnd:
    """Errors right after each bound site: the first site that is off is where it went wrong."""
    prepared = in_reference(case.base.ir, case.bindings, case.reference, taps=True)
    pairs = {tap.site: (tap.after, case.match.values.get(tap.before, tap.before)) for tap in prepared.taps}
    tapped = case.out.ir.clone()
    there = set(with_outputs(tapped, [name for _, name in pairs.values()]))
    try:
        reference = _run(prepared, inputs, case.options)[0]
        actual = _run(as_written(tapped, tapped), inputs, case.options)[0]
    except RunError as error:
        return replace(result, notes=(*result.notes, f"the sites could not be looked at one by one: {error.message}"))
    sites = [
        SiteError(site, relative_error([actual[name]], [reference[after]]))
        for site, (after, name) in pairs.items()
        if name in there and name in actual and after in reference
    ]
    worst = max(sites, key=lambda site: site.error, default=None)
    result = replace(result, sites=tuple(sites), worst_site=worst.site if worst else "")
    if result.verdict != "fail":
        return result
    return replace(result, reason=result.reason + _culprit(sites, result.tolerance or 0.0))


def _culprit(sites: Sequence[SiteError], tolerance: float) -> str:
    off = [site for site in sites if site.error > tolerance]
    if off:
        return f"; the first site that is off is {off[0].site} ({off[0].error:.3g})"
    return f"; no single site is off by more than {max((site.error for site in sites), default=0.0):.3g}"
