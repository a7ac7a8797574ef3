"""The TensorRT target: a graph and its weights become a plan.

The library does its work in a process of its own (:mod:`loracc.targets.tensorrt_process`), in this order: collecting
logger, builder, network, parser with our weights, configuration, checked profiles, timing cache, serialize. Every
step's return value is looked at there: TensorRT raises nothing. Here is decided what it is told, and what its answer
means.

The weights are handed to the parser one by one (``load_initializer``), so a folded model needs no file on disk and
there is no 2 GB limit; the plan is the same, byte for byte, as that of a parsed file with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir as ir

from loracc.errors import InputError, UnsupportedError
from loracc.passes.encode_weights import encoded
from loracc.targets.onnx_file import graph_bytes
from loracc.targets.tensorrt_module import TensorRT, complaint
from loracc.targets.tensorrt_process import Answer, run_worker
from loracc.targets.tensorrt_profiles import Profile
from loracc.tensors import dims

__all__ = ["BuildOptions", "Plan", "build_plan"]

#: The smallest tensor that is handed over on its own; smaller ones (axes, shapes) travel in the graph.
_SMALL_BYTES = 1024


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is told.

    Attributes:
        tf32: Allow TF32 in float32 products; TensorRT's own default is yes, loracc says it explicitly.
        workspace: Bytes of scratch memory, None for all there is.
        optimization_level: 0 to 5, None for the builder's default.
        version_compatible: The plan runs with later minor versions.
        strip: Leave the weights out; they are refitted before use.
        refittable: "none", "adapter" (only ``marked``) or "all".
        marked: Names of the weights that "adapter" marks.
        timing_cache: Bytes of an earlier build's cache, empty to begin one; None without.
        error_on_timing_cache_miss: Time no tactic: every one must be in the cache.
    """

    tf32: bool = False
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    strip: bool = False
    refittable: str = "none"
    marked: Sequence[str] = ()
    timing_cache: bytes | None = None
    error_on_timing_cache_miss: bool = False


@dataclass(frozen=True)
class Plan:
    """A serialized engine that was written.

    Attributes:
        timing_cache: What its build left.
        memory: A digest of the addresses that the builder found: the next build that finds these gives the same plan.
            Empty where they are random.
    """

    timing_cache: bytes
    memory: str


def build_plan(
    trt: TensorRT,
    model: ir.Model,
    profiles: Sequence[Profile],
    options: BuildOptions,
    output: Path,
    *,
    attempt: int = 0,
    fixed: bool = True,
) -> Plan:
    """Build an engine.

    Args:
        trt: The flavour.
        model: What to build; its lazy weights are computed one after the other.
        profiles: From :func:`loracc.targets.tensorrt_profiles.parse_profiles`.
        options: See there.
        output: Where the plan is written.
        attempt: The builder's memory is laid out otherwise for each number: it may number tensors in another order.
        fixed: Ask for fixed addresses.

    Raises:
        UnsupportedError: TensorRT cannot parse an operator, or builds nothing; with its own last messages.
        InputError: A weight to be refitted is none that TensorRT knows, or options contradict each other.
    """
    _check(trt, options, profiles)
    graph, weights = _skeleton(encoded(model))
    told = {"options": _told(trt, options), "profiles": profiles, "attempt": attempt}
    cache = options.timing_cache or b""
    answer = run_worker(trt, told, graph, weights, output, cache=cache, fixed=fixed)
    if answer.refused is not None:
        _refuse(trt, options, profiles, answer)
    return Plan(answer.timing_cache, answer.memory)


def _told(trt: TensorRT, options: BuildOptions) -> dict[str, Any]:
    """The options for the process: equal for two builds that differ in what was folded only."""
    kept = options.timing_cache is not None
    return {
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "marked": list(options.marked) if options.refittable == "adapter" else [],
        # TensorRT for RTX picks its tactics on the user's GPU: there a timing cache is a deprecated no-op.
        "timed": trt.flavor != "rtx",
        "flags": {
            "TF32": options.tf32,
            "VERSION_COMPATIBLE": options.version_compatible,
            "STRIP_PLAN": options.strip,
            # A cache that is kept holds one tactic an operation, and the next build takes that one.
            "EDITABLE_TIMING_CACHE": kept,
            "ERROR_ON_TIMING_CACHE_MISS": options.error_on_timing_cache_miss,
            # REFIT_IDENTICAL is undefined for other weights; STRIP_PLAN alone would set it in silence.
            "REFIT": options.refittable == "all",
            "REFIT_INDIVIDUAL": options.refittable == "adapter",
        },
    }


def _refuse(trt: TensorRT, options: BuildOptions, profiles: Sequence[Profile], answer: Answer) -> NoReturn:
    """What the process's refusal means, in words."""
    assert answer.refused is not None
    step, names = answer.refused["step"], answer.refused["names"]

    def said(what: str) -> str:
        errors = answer.refused["errors"] if answer.refused else []
        return "\n  ".join([what, *errors]) if errors else complaint(what, answer.messages)

    if step == "graph":
        raise UnsupportedError(said("TensorRT's parser cannot read the graph."))
    if step == "weight":
        raise UnsupportedError(said(f"TensorRT refuses the weight {names[0]!r}."))
    if step == "operators":
        raise UnsupportedError(
            said("TensorRT cannot build this graph."),
            hint="An operator that it does not know has to be exported differently, or run in ONNX Runtime.",
        )
    if step == "profile":
        raise UnsupportedError(said(f"TensorRT refuses the profile {profiles[int(names[0]) - 1]}."))
    if step == "marks":
        raise InputError(
            said(f"TensorRT knows no weight of these names, so they cannot be refitted: {', '.join(names)}."),
            hint="Build with --refittable all.",
        )
    if step == "cache":
        raise InputError(
            said("--timing-cache: TensorRT refuses it."),
            hint="It is of another version or another GPU: remove it, and the next build writes a new one.",
        )
    raise UnsupportedError(said("TensorRT built no engine."), hint=_hint(trt, options))


def _check(trt: TensorRT, options: BuildOptions, profiles: Sequence[Profile]) -> None:
    if options.timing_cache is not None and trt.flavor == "rtx":
        raise InputError(
            "--timing-cache: TensorRT for RTX has none; it picks its tactics on the user's GPU.",
            hint="Leave the option out, or build with --flavor tensorrt.",
        )
    if options.error_on_timing_cache_miss and not options.timing_cache:
        raise InputError(
            "--error-on-timing-cache-miss: there is no timing cache to find the tactics in.",
            hint="Build the base with --timing-cache FILE first, and name that file here.",
        )
    if options.strip and options.refittable == "none":
        raise InputError(
            "--strip leaves the weights out of the engine, and without --refittable nothing can put them back.",
            hint="Add --refittable adapter or --refittable all.",
        )
    if options.refittable != "none" and len(profiles) > 1:
        raise InputError(
            f"a refittable engine has at most one optimization profile, and {len(profiles)} were given.",
            hint="Give one --profile for each dynamic input, or build with --refittable none.",
        )
    if options.refittable == "adapter" and not options.marked:
        raise InputError(
            "--refittable adapter makes the adapter's weights refittable, and no adapter was given.",
            hint="Name it with --adapter, or build with --refittable all.",
        )


def _skeleton(model: ir.Model) -> tuple[bytes, Mapping[str, ir.TensorProtocol]]:
    """The serialized graph whose large weights are references to nowhere, and those weights.

    Everything else is inside: the parser looks for no file. A subgraph's weights have no names of their own there.
    Without the model's own properties, which say who wrote it and what was folded: the same graph, the same bytes.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    places: dict[ir.Value, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _SMALL_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        weights[name] = tensor
        places[value] = ir.ExternalTensor(
            "handed-over-in-memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(dims(tensor)), name=name
        )
    bare = ir.Model(model.graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))
    return graph_bytes(bare, places, Path("the graph")), weights


def _hint(trt: TensorRT, options: BuildOptions) -> str | None:
    if options.error_on_timing_cache_miss:
        return "The timing cache may lack a tactic: build the base once more without --error-on-timing-cache-miss."
    if trt.flavor == "rtx" and (options.refittable != "none" or options.strip):
        return "TensorRT for RTX builds refittable and stripped engines only on a machine with a GPU."
    return None
