"""The manifest beside an engine: what it was built from and with, and where each weight lies in it.

A plan runs code when it is loaded, so its digest is what a loader checks first: :func:`read_manifest` refuses a plan
that has no manifest or is not the one described. That tells a foreign or damaged file apart; it is no signature.

The builder stores most weights as they are. Where one lies in the plan, byte for byte, the manifest has its places,
which anyone can check against its ``sha256``; comparing two plans outside their weights needs no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError
from loracc.targets.onnx_file import graph_bytes, initializers
from loracc.targets.tensorrt_manifest_check import check_body
from loracc.targets.tensorrt_places import Place, find_places
from loracc.tensors import dims

__all__ = [
    "PLANS",
    "Manifest",
    "WeightPlace",
    "describe",
    "input_graph",
    "manifest_name",
    "masked_graph",
    "read_engine",
    "read_manifest",
    "replaced_weights",
]

#: Endings of a TensorRT plan.
PLANS = (".engine", ".plan")
_FORMAT = 2


@dataclass(frozen=True)
class WeightPlace:
    """One initializer of the graph that an engine was built from.

    Attributes:
        dtype: "FLOAT16", ...
        shape: Its shape.
        sha256: Of its bytes.
        nbytes: How many.
        places: Where it lies in the plan: one, or one for each block of its columns, in their order; none where it is
            not stored as it is, or is too small to tell.
    """

    dtype: str
    shape: Sequence[int]
    sha256: str
    nbytes: int
    places: Sequence[Place]


@dataclass(frozen=True)
class Manifest:
    """What is in the file.

    Attributes:
        flavor, version: Which TensorRT built the plan.
        gpu: On which GPU; None on a machine without one.
        model: File name of the ONNX model.
        plan_sha256, plan_bytes: Of the plan.
        graph_sha256: Of the graph with its weights masked: equal for a base and its folded models.
        adapters: name, format and digest of what was folded.
        sites: Names of the folded sites.
        inputs: name, dtype and shape of what is fed; a dynamic axis is its symbol.
        profiles: Input name -> (min, opt, max), one mapping a profile.
        options: What the builder was told.
        repeats: Of repeated builds of this model: "builds", and in how many bytes they "differ"; empty if not known.
        weights: By initializer.
        memory: A digest of the addresses that the builder found, by which it orders some tensors; empty where they were
            random, or are not known.
        loracc: Version of loracc.
    """

    flavor: str
    version: str
    gpu: str | None
    model: str
    plan_sha256: str
    plan_bytes: int
    graph_sha256: str
    adapters: Sequence[str]
    sites: Sequence[str]
    inputs: Sequence[Mapping[str, Any]]
    profiles: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    repeats: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, WeightPlace] = field(default_factory=dict)
    memory: str = ""
    loracc: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": _FORMAT, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def refittable(self) -> set[str]:
        """Names of the weights that can be replaced."""
        which = self.options["refittable"]
        return set(self.weights) if which == "all" else set(self.options["marked"]) if which == "adapter" else set()


def manifest_name(engine: Path) -> str:
    """Name of the manifest beside an engine."""
    return f"{engine.name}.json"


def masked_graph(model: ir.Model) -> str:
    """sha256 of the graph with every weight's bytes left out."""
    masked = {
        value: ir.ExternalTensor(
            "masked", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(dims(tensor)), name=str(value.name)
        )
        for value in initializers(model)
        if (tensor := value.const_value) is not None and tensor.dtype != ir.DataType.STRING
    }
    # Without the model's own properties: they say who wrote it and what was folded.
    bare = ir.Model(model.graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))
    return hashlib.sha256(graph_bytes(bare, masked, Path("graph"))).hexdigest()


def describe(plan: bytes, graph: ir.Model, **said: Any) -> Manifest:
    """The manifest of a plan and of the model that it was built from.

    Args:
        plan: The serialized engine.
        graph: Its weights are read one after the other.
        said: The fields of :class:`Manifest` that neither of them tells.
    """
    from loracc import __version__

    tensors = {
        str(name): tensor
        for name, value in graph.graph.initializers.items()
        if (tensor := value.const_value) is not None and tensor.dtype != ir.DataType.STRING
    }
    return Manifest(
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        graph_sha256=masked_graph(graph),
        inputs=[_input(value) for value in graph.graph.inputs if value.name not in graph.graph.initializers],
        weights=_places(plan, tensors),
        loracc=__version__,
        **said,
    )


def replaced_weights(manifest: Manifest, plan: bytes, tensors: Mapping[str, ir.TensorProtocol]) -> Manifest:
    """The manifest of a refitted engine: its new plan, and all of its weights."""
    return replace(
        manifest,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        weights=_places(plan, {name: tensors[name] for name in manifest.weights}),
    )


def _places(plan: bytes, tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, WeightPlace]:
    return {
        name: WeightPlace(tensor.dtype.name, dims(tensor), digest, int(tensor.nbytes), places)
        for name, (tensor, digest, places) in find_places(plan, tensors).items()
    }


def _input(value: ir.Value) -> dict[str, Any]:
    shape = [] if value.shape is None else [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": value.dtype.name if value.dtype is not None else "UNDEFINED", "shape": shape}


def input_graph(manifest: Manifest) -> ir.Model:
    """A graph with the engine's inputs and nothing else, for whoever makes up inputs."""
    inputs = [
        ir.Value(name=said["name"], shape=ir.Shape(said["shape"]), type=ir.TensorType(ir.DataType[said["dtype"]]))
        for said in manifest.inputs
    ]
    return ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}), ir_version=10)


def _weight(places: Sequence[dict[str, int]], **said: Any) -> WeightPlace:
    return WeightPlace(places=tuple(Place(**place) for place in places), **said)


def read_engine(path: Path) -> tuple[Manifest, bytes]:
    """An engine's manifest and its plan.

    Raises:
        InputError: There is no such file, it cannot be read, or see :func:`read_manifest`.
    """
    if not path.is_file():
        what = "a folder, and an engine is a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}.", hint="Name an engine that loracc build-trt wrote.")
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return read_manifest(path, plan), plan


def read_manifest(engine: Path, plan: bytes) -> Manifest:
    """The manifest of ``engine``, whose bytes are ``plan``.

    Raises:
        InputError: There is none, it is malformed, or it describes another plan.
    """
    path = engine.with_name(manifest_name(engine))
    if not path.is_file():
        raise InputError(
            f"{engine}: no manifest {path.name} beside it. A plan runs code when it is loaded, so loracc reads "
            "none that it did not build.",
            hint="Build it with loracc build-trt, and move both files together.",
        )
    try:
        manifest = _read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest that this loracc wrote: {error}.", hint="Build it again.") from error
    if hashlib.sha256(plan).hexdigest() != manifest.plan_sha256:
        raise InputError(
            f"{engine}: not the plan that {path.name} describes: its sha256 is another.",
            hint="The file is damaged, or was replaced. Build it again with loracc build-trt.",
        )
    return manifest


def _read(body: Any) -> Manifest:
    if not isinstance(body, dict) or body.pop("format", None) != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    check_body(body)
    weights = {name: _weight(**said) for name, said in body.pop("weights").items()}
    return Manifest(**body, weights=weights)
