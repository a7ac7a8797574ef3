"""The graphs that are run to judge an output: the reference, the unfused model in the output's type, the output itself.

bfloat16 has almost no kernels in ONNX Runtime's CPU provider. It is emulated: weights are the bfloat16 ones, every
operator computes in float32 and its result is rounded to bfloat16, and the runtime's optimizer is off so that no
rounding is optimized away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from loracc.dtypes import Array
from loracc.folded import Binding, annotate, clear_bindings
from loracc.model import BaseModel
from loracc.passes.encode_weights import encoded
from loracc.passes.fold import FoldPass
from loracc.passes.link_biases import LinkBiases
from loracc.passes.retype import RetypePass
from loracc.passes.unfuse import Tap, UnfusePass
from loracc.passes.unshare import UnsharePass
from loracc.proof.kernels import has_kernel
from loracc.proof.options import VerifyOptions
from loracc.requantized import RequantizedTensor
from loracc.runners.runner import OnnxRunner

__all__ = [
    "FLOATS",
    "Prepared",
    "as_written",
    "beside_encoded",
    "in_own_type",
    "in_reference",
    "rounded_at_random",
    "rounded_to_nearest",
    "uses_bfloat16",
    "with_outputs",
]

FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Prepared:
    """A graph ready to run.

    Attributes:
        model: The graph, or the file as it is.
        optimize: Whether the runtime may rewrite it.
        notes: What had to be done to run it.
        taps: Where the bound sites' results are, in an unfused graph.
        adapter: An ``.onnx_adapter`` that is active in every run.
        more: Further inputs for each set of inputs.
    """

    model: ir.Model | Path
    optimize: bool = True
    notes: tuple[str, ...] = ()
    taps: tuple[Tap, ...] = ()
    adapter: Path | None = None
    more: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None

    def runner(self, options: VerifyOptions) -> OnnxRunner:
        """A session on it.

        Raises:
            RunError: The runtime does not load it.
        """
        return OnnxRunner(
            self.model,
            provider=options.provider,
            threads=options.threads,
            optimize=self.optimize,
            adapter=self.adapter,
        )

    def run(self, inputs: Sequence[Mapping[str, Array]], options: VerifyOptions) -> list[dict[str, Array]]:
        """The outputs for each set of inputs.

        Raises:
            RunError: The runtime refused the model or the inputs.
        """
        runner = self.runner(options)
        return [runner.run({**feeds, **self.more(feeds)} if self.more else feeds) for feeds in inputs]


def in_reference(base: ir.Model, bindings: Sequence[Binding], dtype: ir.DataType, *, taps: bool = False) -> Prepared:
    """The base with ``bindings`` as branches, computed in ``dtype``; with no bindings, the base itself.

    Args:
        base: The original graph; left as it is.
        bindings: The deltas.
        dtype: FLOAT or DOUBLE.
        taps: Make every bound site's result an output too.
    """
    graph, unfuse = _unfused(base, bindings)
    notes = []
    if taps:
        with_outputs(graph, [tap.after for tap in unfuse.taps])
    opsets = graph.graph.opset_imports
    retype = RetypePass(
        dtype, keep_outputs=False, in_float=lambda node, values: not has_kernel(node, values, dtype, opsets)
    )
    retype(graph)
    if retype.wrapped:
        kinds = ", ".join(sorted({name.split()[0] for name in retype.wrapped}))
        notes.append(f"{len(retype.wrapped)} reference nodes run in float32, having no {dtype.name} kernel: {kinds}")
    if unfuse.replaced:
        reasons = "; ".join(sorted(set(unfuse.replaced.values())))
        notes.append(f"{len(unfuse.replaced)} weights of the reference are W + ΔW, not a branch: {reasons}")
    return Prepared(graph, optimize=False, notes=tuple(notes), taps=tuple(unfuse.taps))


def as_written(model: ir.Model | Path, graph: ir.Model) -> Prepared:
    """A model in its own type: the file as it is where that runs, the graph with emulated rounding where it does not.

    Args:
        model: What to run: the file, or the graph.
        graph: Its graph.
    """
    if not _uses(graph, ir.DataType.BFLOAT16):
        return Prepared(model)
    copy, _ = _unfused(graph, ())
    return _emulated(copy, ir.DataType.BFLOAT16)


def in_own_type(base: ir.Model, bindings: Sequence[Binding], dtype: ir.DataType | None = None) -> Prepared:
    """The unfused model as a device of its own type computes it: what the type costs anyway.

    16-bit types are emulated even where the runtime takes them: ONNX Runtime on a CPU computes float16 in float32 and
    leaves out most of the roundings.

    Args:
        base: The original graph; left as it is.
        bindings: The deltas, as branches.
        dtype: What the output's float types were changed to, when they were.
    """
    graph, _ = _unfused(base, bindings)
    if dtype is not None:
        RetypePass(dtype, sources=FLOATS)(graph)
    for half in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16):
        if _uses(graph, half):
            return _emulated(graph, half)
    return Prepared(graph)


def beside_encoded(base: ir.Model, bindings: Sequence[Binding]) -> Prepared:
    """The base with ``bindings`` as branches beside its quantized weights, which stay what they are."""
    graph, _ = _unfused(base, bindings)
    return as_written(encoded(graph), graph)


def rounded_at_random(base: BaseModel, bindings: Sequence[Binding], seed: int) -> Prepared:
    """The base with the deltas in its weights, each quantized one rounded at random between its neighbours.

    Args:
        base: The original, its quantized weights decoded; left as it is.
        bindings: The deltas.
        seed: Of the rounding.
    """
    graph = _folded(base, bindings)
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, RequantizedTensor):
            value.const_value = RequantizedTensor(tensor.decoded, tensor.bindings, dither=seed + 1)
    LinkBiases()(graph)
    note = "what quantization costs is measured with the same grids and weights rounded to them at random"
    return replace(as_written(encoded(graph), graph), notes=(note,))


def rounded_to_nearest(base: BaseModel, bindings: Sequence[Binding], dtype: ir.DataType | None = None) -> Prepared:
    """What a fold without calibration writes, to be run beside one with it.

    Args:
        base: The original; left as it is.
        bindings: The deltas.
        dtype: What the output's float types were changed to, when they were.
    """
    graph = _folded(base, bindings)
    LinkBiases()(graph)
    if dtype is not None:
        RetypePass(dtype, sources=FLOATS)(graph)
    return as_written(encoded(graph), graph)


def _folded(base: BaseModel, bindings: Sequence[Binding]) -> ir.Model:
    """A copy with the deltas in its weights; biases of integer operators are not linked yet."""
    graph = base.ir.clone()
    for value in graph.graph.initializers.values():
        clear_bindings(value)
    annotate(graph, bindings)
    UnsharePass(base.sites)(graph)
    FoldPass()(graph)
    return graph


def _emulated(graph: ir.Model, dtype: ir.DataType) -> Prepared:
    """Float32 operators, every result of type ``dtype`` rounded to it; in place."""
    RetypePass(ir.DataType.FLOAT, sources=[dtype], rounding=dtype, keep_outputs=False)(graph)
    note = f"{dtype.name.lower()} is emulated: float32 operators, every result rounded, no graph optimizations"
    return Prepared(graph, optimize=False, notes=(note,))


def _uses(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether anything in the graph is of this type."""
    if any(value.dtype == dtype for value in model.graph.initializers.values()):
        return True
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return any(value.dtype == dtype for node in nodes for value in node.outputs)


def uses_bfloat16(model: ir.Model) -> bool:
    """Whether anything in the graph is bfloat16."""
    return _uses(model, ir.DataType.BFLOAT16)


def with_outputs(model: ir.Model, names: Sequence[str]) -> list[str]:
    """Make inner values outputs too, in place; those that are there and of the main graph. Returns their names."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    there = {str(value.name) for value in model.graph.outputs}
    for name in names:
        if name in values and name not in there:
            model.graph.outputs.append(values[name])
            there.add(name)
    return [name for name in names if name in there]


def _unfused(base: ir.Model, bindings: Sequence[Binding]) -> tuple[ir.Model, UnfusePass]:
    graph = base.clone()
    unfuse = UnfusePass(bindings)
    unfuse(graph)
    if graph.functions:
        InlinePass()(graph)
    return graph, unfuse
