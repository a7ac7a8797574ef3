"""The TensorRT target: a graph and its weights become a plan.

Build order (docs/tensorrt.md): collecting logger, builder, network, parser with our weights, configuration, checked
profiles, timing cache, serialize. Every step's return value is looked at: TensorRT raises nothing.

The weights are handed to the parser one by one (``load_initializer``), so a folded model needs no file on disk and
there is no 2 GB limit; the plan is the same, byte for byte, as that of a parsed file with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.passes.encode_weights import encoded
from loracc.targets.onnx_file import graph_bytes
from loracc.targets.tensorrt_module import TensorRT
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
    """

    tf32: bool = False
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    strip: bool = False
    refittable: str = "none"
    marked: Sequence[str] = ()
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """A serialized engine and the timing cache that its build left."""

    data: bytes
    timing_cache: bytes


def build_plan(trt: TensorRT, model: ir.Model, profiles: Sequence[Profile], options: BuildOptions) -> Plan:
    """Build an engine.

    Args:
        trt: The flavour.
        model: What to build; its lazy weights are computed one after the other.
        profiles: From :func:`loracc.targets.tensorrt_profiles.parse_profiles`.
        options: See there.

    Raises:
        UnsupportedError: TensorRT cannot parse an operator, or builds nothing; with its own last messages.
        InputError: A weight to be refitted is none that TensorRT knows, or options contradict each other.
    """
    module = trt.module
    model = encoded(model)
    _check(trt, options, profiles)
    builder = module.Builder(trt.logger)
    network = builder.create_network(0)
    parser = module.OnnxParser(network, trt.logger)
    # The parser keeps pointers into these until the plan is made.
    held = _parse(trt, parser, model)
    config = _configure(trt, builder, options)
    for profile in profiles:
        _add_profile(trt, builder, config, profile)
    if options.refittable == "adapter":
        _mark(trt, network, options.marked)
    # TensorRT for RTX picks its tactics on the user's GPU: there a timing cache is a deprecated no-op.
    timed = trt.flavor != "rtx"
    cache = _use_cache(trt, config, options) if timed else None  # must outlive the build
    plan = builder.build_serialized_network(network, config)
    del parser, held, cache  # in this order
    if plan is None:
        raise UnsupportedError(trt.complaint("TensorRT built no engine."), hint=_hint(trt, options))
    return Plan(bytes(plan), bytes(config.get_timing_cache().serialize()) if timed else b"")


def _check(trt: TensorRT, options: BuildOptions, profiles: Sequence[Profile]) -> None:
    if options.timing_cache is not None and trt.flavor == "rtx":
        raise InputError(
            "--timing-cache: TensorRT for RTX has none; it picks its tactics on the user's GPU.",
            hint="Leave the option out, or build with --flavor tensorrt.",
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


def _parse(trt: TensorRT, parser: Any, model: ir.Model) -> list[Array]:
    """Parse the graph with its weights handed over separately; returns the arrays that must stay alive."""
    graph, weights = _skeleton(model)
    if not parser.load_model_proto(graph):
        raise UnsupportedError(_parser_errors(trt, parser, "TensorRT's parser cannot read the graph."))
    held = []
    for name, tensor in weights.items():
        array = _array(tensor)
        held.append(array)
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise UnsupportedError(_parser_errors(trt, parser, f"TensorRT refuses the weight {name!r}."))
    if not parser.parse_model_proto():
        raise UnsupportedError(
            _parser_errors(trt, parser, "TensorRT cannot build this graph."),
            hint="An operator that it does not know has to be exported differently, or run in ONNX Runtime.",
        )
    return held


def _skeleton(model: ir.Model) -> tuple[bytes, Mapping[str, ir.TensorProtocol]]:
    """The serialized graph whose large weights are references to nowhere, and those weights.

    Everything else is inside: the parser looks for no file. A subgraph's weights have no names of their own there.
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
    return graph_bytes(model, places, Path("the graph")), weights


def _array(tensor: ir.TensorProtocol) -> Array:
    """The bytes that the parser is to read; types of less than a byte are packed."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy())


def _configure(trt: TensorRT, builder: Any, options: BuildOptions) -> Any:
    module = trt.module
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    flags = {
        "TF32": options.tf32,
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip,
        # A cache that is kept holds one tactic an operation, and the next build takes that one.
        "EDITABLE_TIMING_CACHE": options.timing_cache is not None and trt.flavor != "rtx",
        # REFIT_IDENTICAL is undefined for other weights; STRIP_PLAN alone would set it in silence.
        "REFIT": options.refittable == "all",
        "REFIT_INDIVIDUAL": options.refittable == "adapter",
    }
    for name, wanted in flags.items():
        flag = getattr(module.BuilderFlag, name)
        (config.set_flag if wanted else config.clear_flag)(flag)
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    return config


def _use_cache(trt: TensorRT, config: Any, options: BuildOptions) -> Any:
    cache = config.create_timing_cache(options.timing_cache or b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            trt.complaint("--timing-cache: TensorRT refuses it."),
            hint="It is of another version or another GPU: remove it, and the next build writes a new one.",
        )
    return cache


def _add_profile(trt: TensorRT, builder: Any, config: Any, shapes: Profile) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in shapes.items():
        profile.set_shape(name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise UnsupportedError(trt.complaint(f"TensorRT refuses the profile {shapes}."))


def _mark(trt: TensorRT, network: Any, names: Sequence[str]) -> None:
    refused = [name for name in names if not network.mark_weights_refittable(name)]
    if refused:
        raise InputError(
            trt.complaint(
                f"TensorRT knows no weight of these names, so they cannot be refitted: {', '.join(refused)}."
            ),
            hint="Build with --refittable all.",
        )


def _parser_errors(trt: TensorRT, parser: Any, what: str) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [f"{error.node_operator()} {error.node_name()!r}: {error.desc()}".strip() for error in errors]
    return "\n  ".join([what, *said]) if said else trt.complaint(what)


def _hint(trt: TensorRT, options: BuildOptions) -> str | None:
    if trt.flavor == "rtx" and (options.refittable != "none" or options.strip):
        return "TensorRT for RTX builds refittable and stripped engines only on a machine with a GPU."
    return None
