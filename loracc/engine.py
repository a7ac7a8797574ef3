"""``build-trt``: a TensorRT engine from an ONNX file, with adapters folded in memory on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError

if TYPE_CHECKING:
    from loracc.folded import Binding
    from loracc.model import BaseModel
    from loracc.targets.tensorrt_module import TensorRT

__all__ = ["EngineResult", "build_trt", "manifest_name"]

Path_ = str | Path


@dataclass(frozen=True)
class EngineResult:
    """What was built.

    Attributes:
        output: The engine.
        files: Names of the files written: the manifest, the engine.
        flavor, version: Which TensorRT built it.
        bytes: Size of the plan.
        sites: Names of the weights that were folded.
        manifest: What the manifest says.
    """

    output: str
    files: list[str]
    flavor: str
    version: str
    bytes: int
    sites: list[str]
    manifest: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


def manifest_name(engine: Path) -> str:
    """Name of the manifest beside an engine."""
    return f"{engine.name}.json"


def build_trt(
    model: Path_,
    adapters: Sequence[Path_] = (),
    output: Path_ = "",
    *,
    flavor: str | None = None,
    profiles: Sequence[str] = (),
    workspace: int | None = None,
    tf32: bool = False,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    strip: bool = False,
    refittable: str = "none",
    timing_cache: Path_ | None = None,
    maps: Sequence[str] = (),
    original: Path_ | None = None,
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
        workspace: Bytes of scratch memory.
        tf32: Allow TF32.
        optimization_level: 0 to 5.
        version_compatible: The plan runs with later minor versions.
        strip: Leave the weights out of the plan.
        refittable: "none", "adapter" (the folded weights) or "all".
        timing_cache: Read if it is there, and written: the same tactics for the next build.
        maps, original, options: As for :func:`loracc.fold`.
        force: Replace the output.

    Raises:
        LoraccError: The input or the call is wrong, or TensorRT builds nothing, with its own last messages.
    """
    from loracc.formats import parse_adapter_spec
    from loracc.staging import Staging
    from loracc.targets.tensorrt_engine import BuildOptions, build_plan
    from loracc.targets.tensorrt_module import load_flavor
    from loracc.targets.tensorrt_profiles import parse_profiles

    path = Path(output)
    if path.suffix.lower() not in (".engine", ".plan"):
        raise InputError(
            f"{output or 'no output'}: an engine's name ends in .engine or .plan.", hint="Name it with -o."
        )
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    inputs = [Path(model), *(Path(spec.path) for spec in specs)]
    with Staging(path, inputs=inputs, force=force, companions=(manifest_name(path),)) as stage:
        trt = load_flavor(flavor)
        lowered, bindings = _folded(model, specs, maps, original, options)
        told = BuildOptions(
            tf32,
            workspace,
            optimization_level,
            version_compatible,
            strip,
            refittable,
            sorted({binding.site.initializer for binding in bindings}),
            _read(timing_cache),
        )
        shapes = parse_profiles(profiles, lowered.ir.graph.inputs)
        plan = build_plan(trt, lowered.ir, shapes, told)
        stage.path.write_bytes(plan.data)
        manifest = _manifest(trt, plan.data, shapes, told, lowered)
        stage.path.with_name(manifest_name(path)).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if timing_cache is not None:
        Path(timing_cache).write_bytes(plan.timing_cache)
    sites = [binding.site.name for binding in bindings]
    return EngineResult(str(path), stage.files, trt.flavor, trt.version, len(plan.data), sites, manifest)


def _folded(
    model: Path_, specs: Sequence[Any], maps: Sequence[str], original: Path_ | None, options: dict[str, Any]
) -> tuple[BaseModel, list[Binding]]:
    from loracc.binding import bind_adapters
    from loracc.formats import load_adapter
    from loracc.lower import lower
    from loracc.model import LoadOptions
    from loracc.sources import load_model, sniff

    if sniff(model) != "onnx":
        raise InputError(
            f"{model}: build-trt takes an .onnx file.", hint=f"Make one first: loracc fold {model} ADAPTER -o OUT.onnx"
        )
    loaded = load_model(model, LoadOptions())
    if not specs:
        return loaded, []
    read = [load_adapter(spec.path, name=spec.name, **options).scaled(spec.weight) for spec in specs]
    loaded, bound = bind_adapters(loaded, read, maps, False, original)
    return lower(loaded), list(bound.bindings)


def _read(path: Path_ | None) -> bytes | None:
    if path is None:
        return None
    return Path(path).read_bytes() if Path(path).is_file() else b""


def _manifest(trt: TensorRT, plan: bytes, profiles: Sequence[Any], options: Any, model: BaseModel) -> dict[str, Any]:
    """What an engine was built from and with; a plan runs code, so its digest is what a loader checks first."""
    from loracc import __version__
    from loracc.targets.onnx_file import graph_bytes, initializers
    from loracc.tensors import dims

    import onnx_ir as ir  # isort: skip

    masked = {
        value: ir.ExternalTensor(
            "masked", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(dims(tensor)), name=str(value.name)
        )
        for value in initializers(model.ir)
        if (tensor := value.const_value) is not None and tensor.dtype != ir.DataType.STRING
    }
    graph = graph_bytes(model.ir, masked, Path("graph"))
    told = {key: value for key, value in vars(options).items() if key != "timing_cache"}
    return {
        "loracc": __version__,
        "flavor": trt.flavor,
        "version": trt.version,
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "profiles": list(profiles),
        "options": {key: list(value) if isinstance(value, tuple | list) else value for key, value in told.items()},
    }
