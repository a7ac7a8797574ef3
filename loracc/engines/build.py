"""``build-trt``: a TensorRT engine from an ONNX file, with adapters folded in memory on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.folded import Binding
    from loracc.model import BaseModel
    from loracc.targets.tensorrt_engine import Plan

__all__ = ["EngineResult", "build_trt", "check_engine_name", "load_onnx", "whole_weights"]

Path_ = str | Path
#: ``--like``: at random addresses MiniLM in float32 has two orders in 8 builds, at other fixed ones three.
_MOST_BUILDS = 12
#: Options that say how tactics are found, and nothing of what is in the plan.
_NOT_IN_THE_PLAN = ("timing_cache", "error_on_timing_cache_miss")


@dataclass(frozen=True)
class EngineResult:
    """What was built.

    Attributes:
        output: The engine.
        files: Names of the files written: the manifest, the engine.
        flavor, version: Which TensorRT built it.
        bytes: Size of the plan.
        sites: Names of the weights that were folded.
        manifest: What the manifest says, without its table of weights.
        builds: How often it was built until it was like another.
    """

    output: str
    files: list[str]
    flavor: str
    version: str
    bytes: int
    sites: list[str]
    manifest: dict[str, Any]
    builds: int = 1

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


def build_trt(
    model: Path_,
    adapters: Sequence[Path_] = (),
    output: Path_ = "",
    *,
    flavor: str | None = None,
    profiles: Sequence[str] = (),
    max_rank: int | None = None,
    workspace: int | None = None,
    tf32: bool = False,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    strip: bool = False,
    refittable: str = "none",
    timing_cache: Path_ | None = None,
    error_on_timing_cache_miss: bool = False,
    like: Path_ | None = None,
    repeats: int = 1,
    original: Path_ | None = None,
    maps: Sequence[str] = (),
    force: bool = False,
    **options: Any,
) -> EngineResult:
    """Build a TensorRT engine; adapters are folded in memory, and the weights handed to the parser one by one.

    Args:
        model: An ``.onnx`` file, of any size.
        adapters: What to fold first, as for :func:`loracc.fold`.
        output: The engine; a manifest goes beside it.
        flavor: "tensorrt" or "rtx"; the one that is installed when None.
        profiles: ``NAME:MIN:OPT:MAX`` for each dynamic input.
        max_rank: Of a graph of ``attach --as inputs``: the largest rank of an adapter. Its factors become inputs whose
            rank reaches from 0 to it; those with a profile of their own need none.
        workspace: Bytes of scratch memory.
        tf32: Allow TF32.
        optimization_level: 0 to 5.
        version_compatible: The plan runs with later minor versions.
        strip: Leave the weights out of the plan.
        refittable: "none", "adapter" (the folded weights) or "all".
        timing_cache: Read if it is there, and written: the same tactics for the next build.
        error_on_timing_cache_miss: Build only with tactics of that cache.
        like: An engine of the base. The builder numbers some tensors in the order of their addresses; the build is
            repeated at other ones until every byte outside the weights is as in this engine.
        repeats: Build so many times and record in the manifest in how many bytes the builds differ from one another.
        original, maps, options: As for :func:`loracc.fold`.
        force: Replace the output.

    Raises:
        LoraccError: The input or the call is wrong, or TensorRT builds nothing, with its own last messages.
        CheckFailed: No build was ``like`` the other engine.
    """
    from loracc.binding import read_adapters
    from loracc.devices import gpu_name
    from loracc.formats import parse_adapter_spec
    from loracc.staging import Staging
    from loracc.targets.tensorrt_engine import BuildOptions, build_plan
    from loracc.targets.tensorrt_manifest import describe, manifest_name, read_engine
    from loracc.targets.tensorrt_module import load_flavor
    from loracc.targets.tensorrt_profiles import parse_profiles

    path = check_engine_name(output)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    inputs = [Path(model), *(Path(spec.path) for spec in specs), *([Path(like)] if like is not None else [])]
    if like is not None:
        read_engine(Path(like))  # before anything is built
    cache = _read_cache(timing_cache, [*inputs, path])
    with Staging(path, inputs=inputs, force=force, companions=(manifest_name(path),)) as stage:
        trt = load_flavor(flavor)
        read = read_adapters(specs, options, combine=None, density=None, rank=None, seed=0)
        lowered, bindings = _folded(load_onnx(model), read, maps, original)
        told = BuildOptions(
            tf32,
            workspace,
            optimization_level,
            version_compatible,
            strip,
            refittable,
            tuple(sorted({binding.site.initializer for binding in bindings})),
            cache,
            error_on_timing_cache_miss,
        )
        shapes = parse_profiles(_all_profiles(lowered, profiles, max_rank), lowered.ir.graph.inputs)
        said: dict[str, Any] = {
            "flavor": trt.flavor,
            "version": trt.version,
            "gpu": gpu_name(),
            "model": Path(model).name,
            "adapters": _described(read),
            "sites": [binding.site.name for binding in bindings],
            "profiles": shapes,
            "options": {key: value for key, value in vars(told).items() if key not in _NOT_IN_THE_PLAN},
        }

        def build(attempt: int = 0) -> Plan:
            return build_plan(trt, lowered.ir, shapes, told, stage.path, attempt=attempt)

        said["repeats"] = _repeated(build, stage.path, repeats) if repeats > 1 else {}
        for builds in range(1, _MOST_BUILDS + 1):
            plan = build(builds - 1)
            data = stage.path.read_bytes()
            manifest = describe(data, lowered.ir, memory=plan.memory, **said)
            manifest.write(stage.path.with_name(manifest_name(path)))
            if like is None or _is_like(Path(like), stage.path, last=builds == _MOST_BUILDS):
                break
    if timing_cache is not None:
        Path(timing_cache).write_bytes(plan.timing_cache)
    table = replace(manifest, weights={}).to_json()
    sites = list(manifest.sites)
    return EngineResult(str(path), stage.files, trt.flavor, trt.version, len(data), sites, table, builds)


def _repeated(build: Callable[[], Plan], path: Path, count: int) -> dict[str, int]:
    """How many plans of one model, and the most bytes in which one differs from the first."""
    import numpy as np

    plans = []
    for _ in range(count):
        build()
        plans.append(np.frombuffer(path.read_bytes(), np.uint8))
    first, *others = plans
    differ = (int(np.count_nonzero(first != one)) if one.size == first.size else one.size for one in others)
    return {"builds": count, "differ": max(differ)}


def _all_profiles(model: BaseModel, profiles: Sequence[str], max_rank: int | None) -> list[str]:
    """What was given, and the ranges of switchable factors, which become inputs."""
    from loracc.targets.tensorrt_parameters import factor_profiles, make_inputs

    manifest = make_inputs(model.ir)
    if manifest is not None:
        return [*profiles, *factor_profiles(manifest, model.ir.graph.inputs, profiles, max_rank)]
    if max_rank is not None:
        raise InputError(
            "--max-rank is the range of switchable factors, and the graph has none.",
            hint="Leave it out, or make such a graph: loracc attach BASE.onnx ADAPTER --as inputs -o OUT.onnx",
        )
    return list(profiles)


def _is_like(other: Path, built: Path, *, last: bool) -> bool:
    """Whether two plans are equal outside their weights; raises where another build cannot or did not help."""
    from loracc.proof.plans import compare_plans

    found = compare_plans(other, built)
    if found.verdict == "pass":
        return True
    if found.again and not last:
        return False
    tries = f" in {_MOST_BUILDS} builds" if last else ""
    raise CheckFailed(
        f"--like {other}: the engine is not like it{tries}: {found.reason}.",
        verification={"verdict": found.verdict, "structure": {"verdict": found.verdict, "reason": found.reason}},
    )


def check_engine_name(output: Path_) -> Path:
    """The path of an engine to be written.

    Raises:
        InputError: Its name is not an engine's.
    """
    from loracc.targets.tensorrt_manifest import PLANS

    path = Path(output)
    if path.suffix.lower() not in PLANS:
        raise InputError(
            f"{output or 'no output'}: an engine's name ends in .engine or .plan.", hint="Name it with -o."
        )
    return path


def load_onnx(model: Path_) -> BaseModel:
    """An ``.onnx`` file, and nothing else.

    Raises:
        InputError: It is another kind of file.
    """
    from loracc.model import LoadOptions
    from loracc.sources import load_model, sniff

    if sniff(model) != "onnx":
        raise InputError(
            f"{model}: TensorRT takes an .onnx file.", hint=f"Make one first: loracc fold {model} ADAPTER -o OUT.onnx"
        )
    return load_model(model, LoadOptions())


def _folded(
    model: BaseModel, adapters: Sequence[Adapter], maps: Sequence[str], original: Path_ | None
) -> tuple[BaseModel, list[Binding]]:
    from loracc.binding import bind_adapters
    from loracc.lower import lower

    if not adapters:
        if original is not None or maps:
            raise InputError("--base and --map find the weights that an adapter is for, and no adapter was given.")
        return model, []
    model, bound = bind_adapters(model, adapters, maps, False, original)
    return whole_weights(lower(model)), list(bound.bindings)


def whole_weights(model: BaseModel) -> BaseModel:
    """``model`` with every fold computed, once: the builder needs them all, and so does the manifest."""
    import onnx_ir as ir

    from loracc.folded import FoldedTensor

    for name, value in model.ir.graph.initializers.items():
        if isinstance(value.const_value, FoldedTensor):
            value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
    return model


def _described(adapters: Sequence[Adapter]) -> list[str]:
    return [f"{adapter.name} {adapter.format} sha256:{adapter.digest}" for adapter in adapters]


def _read_cache(path: Path_ | None, others: Sequence[Path]) -> bytes | None:
    """What an earlier build left; empty to begin one, None without."""
    if path is None:
        return None
    cache = Path(path)
    if cache.is_dir() or not cache.parent.is_dir() or cache in others:
        raise InputError(f"--timing-cache {path}: not a file that can be written.", hint="Name a file of its own.")
    return cache.read_bytes() if cache.is_file() else b""
