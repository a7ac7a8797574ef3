"""The proof of a graph with switchable deltas: with each adapter, without any, and node for node.

* *with an adapter*: the outputs against the unfused model in higher precision, judged as a fold is
  (:mod:`loracc.proof.numbers`); the adapter reaches the runtime as its users hand it over;
* *without*: the outputs are the base's, bit for bit, in the same runtime;
* *structure*: with the branches taken out again, the graph is the base's, and every weight is the base's byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.manifest import Manifest
from loracc.model import BaseModel, LoadOptions
from loracc.passes.delta_nodes import detach
from loracc.passes.encode_weights import encoded
from loracc.proof.graphs import Prepared, as_written, uses_bfloat16
from loracc.proof.numbers import check_end_to_end
from loracc.proof.options import VerifyOptions
from loracc.proof.structure import Match, compare_graphs
from loracc.proof.verdict import EndToEnd, Latency, Numbers, Structure, Verification, Weights, worst
from loracc.proof.weights import check_untouched
from loracc.random_nodes import random_nodes
from loracc.runners.runner import RunError
from loracc.sample_inputs import draw_inputs

__all__ = ["AttachedBase", "AttachedVerification", "More", "Trial", "verify_attached"]


#: Further inputs for a set of the base's inputs.
More = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class AttachedBase:
    """What a graph was attached to.

    Attributes:
        model: The base as it was read.
        plain: Its graph in the output's types.
        dtype: What those were changed to on purpose.
    """

    model: BaseModel
    plain: ir.Model
    dtype: ir.DataType | None = None


@dataclass(frozen=True)
class Trial:
    """One thing to switch on.

    Attributes:
        name: Of the adapter.
        bindings: Its deltas at the base's sites.
        adapter_file: The ``.onnx_adapter`` that switches it on; a relative path is beside the output.
        more: Inputs that switch it on, for each set of the base's inputs.
    """

    name: str
    bindings: Sequence[Binding]
    adapter_file: str = ""
    more: More | None = None


@dataclass(frozen=True)
class AttachedVerification(Verification):
    """A verification whose numbers are the worst adapter's.

    Attributes:
        adapters: Every adapter's verdict on its outputs.
        off: Verdict on the outputs without an adapter.
    """

    adapters: Mapping[str, EndToEnd] = field(default_factory=dict)
    off: EndToEnd = field(default_factory=lambda: EndToEnd("skipped"))

    @property
    def verdict(self) -> Any:
        return worst((super().verdict, self.off.verdict))

    @property
    def reason(self) -> str:
        off = f"without an adapter: {self.off.reason}" if self.off.verdict == "fail" else ""
        return "; ".join(part for part in (super().reason, off) if part)

    def to_json(self) -> dict[str, Any]:
        """As a fold's, with "adapters" and "off"."""
        body = super().to_json()
        body["verdict"] = self.verdict
        body["reason"] = self.reason
        body["adapters"] = {
            name: {"verdict": one.verdict, "max_relative_error": one.max_relative_error, "tolerance": one.tolerance}
            for name, one in self.adapters.items()
        }
        body["off"] = {"verdict": self.off.verdict, "reason": self.off.reason}
        return body


def verify_attached(
    base: AttachedBase,
    path: Path,
    trials: Sequence[Trial],
    *,
    off: More | None = None,
    options: VerifyOptions | None = None,
) -> AttachedVerification:
    """Judge a graph with switchable deltas.

    Args:
        base: What it was attached to.
        path: The graph's file; adapters lie beside it.
        trials: What to switch on, one after the other.
        off: Inputs that switch everything off, where the graph needs some for that.
        options: Inputs, tolerance, provider.

    Raises:
        LoraccError: A file or an input is wrong, or onnxruntime is needed and not installed.
    """
    from loracc.sources import load_model

    options = replace(options or VerifyOptions(), dtype=base.dtype)
    made = load_model(path, LoadOptions())
    match, weights = _structure(base.plain, made.ir, path)
    structure = Structure(
        "fail" if match.differences else "pass",
        match.differences[0] if match.differences else "",
        tuple(match.differences),
        match.nodes,
        optimized_reason="branches are not in the base: the optimized graphs differ by them",
    )
    found = {trial.name: _tried(base.model, made, match, trial, options) for trial in trials}
    worst_one = max(found.values(), key=lambda one: (one.verdict == "fail", one.max_relative_error or 0.0))
    named = [f"adapter {name!r}: {one.reason}" for name, one in found.items() if one.verdict == "fail"]
    if named:
        worst_one = replace(worst_one, reason="; ".join(named))
    return AttachedVerification(
        Numbers(weights, worst_one),
        structure,
        Latency("skipped", "not asked for"),
        adapters=found,
        off=_switched_off(base, made, off, options),
    )


def _structure(plain: ir.Model, made: ir.Model, path: Path) -> tuple[Match, Weights]:
    """The graph without its branches, node for node and byte for byte."""
    manifest = Manifest.from_metadata(made.metadata_props, path)
    bare = made.clone()
    detach(bare, manifest.parameters)
    match = compare_graphs(plain, bare)
    return match, check_untouched(plain, bare, match.pairs)


def _tried(base: BaseModel, made: BaseModel, match: Match, trial: Trial, options: VerifyOptions) -> EndToEnd:
    prepared = _prepared(made, trial.more, made.path.parent / trial.adapter_file if trial.adapter_file else None)
    return check_end_to_end(base, made, made.path, match, trial.bindings, options, prepared)


def _prepared(made: BaseModel, more: More | None, adapter: Path | None) -> Prepared:
    """The file as its users run it; a bfloat16 graph is emulated, with the adapter's parameters as its own."""
    if not uses_bfloat16(made.ir):
        return Prepared(made.path, adapter=adapter, more=more)
    from loracc.formats.onnx_adapter_file import read_parameters

    graph = made.ir.clone()
    for name, array in read_parameters(adapter).items() if adapter else ():
        value = graph.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
    return replace(as_written(graph, graph), more=more)


def _switched_off(base: AttachedBase, made: BaseModel, off: More | None, options: VerifyOptions) -> EndToEnd:
    """Bit for bit what the base gives, in the same runtime, its quantized weights as they are stored."""
    if random := random_nodes(base.model.ir):
        return EndToEnd("skipped", f"{random[0].op_type} {random[0].name!r} draws at random: no two runs are alike")
    try:
        inputs, origin = draw_inputs(base.model, seed=options.seed, draws=options.draws, given=options.inputs)
        plain = as_written(encoded(base.plain), base.plain).run(inputs, options)
    except (RunError, InputError) as error:
        return EndToEnd("skipped", error.message)
    try:
        ours = _prepared(made, off, None).run(inputs, options)
    except RunError as error:
        return EndToEnd("fail", f"the output does not run, and the base does: {error.message}")
    for one, other in zip(plain, ours, strict=True):
        for name, value in one.items():
            if not same_bits(value, other[name]):
                return EndToEnd(
                    "fail", f"output {name!r} is not the base's, bit for bit ({_largest(value, other[name])})"
                )
    return EndToEnd("pass", draws=origin)


def same_bits(one: Array, other: Array) -> bool:
    """Equal in type, shape and every bit; so -0 is not +0, and a NaN is its own equal."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _largest(one: Array, other: Array) -> str:
    if one.shape != other.shape or one.dtype.kind not in "fV":
        return "of another shape or type"
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return f"the largest difference is {float(difference.max()):.3g}"
