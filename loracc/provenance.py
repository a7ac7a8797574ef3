"""From what an output was made: digests of the base and the adapters, scales, sites, options, versions.

The record is one JSON object, in an ``.onnx`` file's metadata under :data:`KEY`, and in a merged checkpoint's folder as
:data:`FILE` (tensor files keep the base's own metadata). It is the same for the same inputs: no time, path or machine.

A model is identified by its weights: names, dtypes, shapes and bytes of its tensors, sorted by name, in sha256. Models
of more than :data:`WHOLE_BYTES` are sampled, so that a fold does not read them twice: some runs of every tensor's rows.
The digest says which ("sha256:", "sha256-sampled:").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc import __version__
from loracc.adapter import Adapter
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.model import BaseModel, LoadOptions
from loracc.passes.encode_weights import encoded
from loracc.targets.checkpoint import RECORD_FILE, RECORD_KEY
from loracc.targets.onnx_file import stamp
from loracc.tensors import dims, open_rows, tile_rows

__all__ = [
    "FILE",
    "KEY",
    "Identity",
    "Provenance",
    "announce_provenance",
    "identify",
    "read_provenance",
    "stamp_provenance",
    "weights_digest",
]

#: Where the record is in a model's metadata (``loracc.`` + the name it is stamped under).
KEY = RECORD_KEY
#: Where it is in a checkpoint's folder.
FILE = RECORD_FILE
SCHEMA = 1
#: Weights up to this many bytes are hashed whole.
WHOLE_BYTES = 256 << 20
#: Runs of rows of a sampled tensor, and bytes of each.
_RUNS, _RUN_BYTES = 16, 4096
#: Packages whose versions can change what is written.
_PACKAGES = ("numpy", "onnx-ir")


@dataclass(frozen=True)
class Identity:
    """A model, told by its weights.

    Attributes:
        format: The kind of file it is: "onnx", "huggingface", ...
        tensors, bytes: How many, and their bytes: what rules most other models out.
        digest: "sha256:..." or "sha256-sampled:...".
    """

    format: str
    tensors: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Provenance:
    """The record.

    Attributes:
        base: What was folded into.
        adapters: A row each: name, format, digest, weight. None when the deltas were found in the base's own graph.
        sites: A row a delta: name, initializer, kind, rank, scale, adapter.
        options: What the user said that decides the result, by the Python API's names; nothing that was left alone.
        versions: Of loracc and the packages that matter.
        previous: The base's own record, when the base was made by loracc.
    """

    base: Identity
    adapters: tuple[dict[str, Any], ...] = ()
    sites: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    previous: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        base: Identity,
        adapters: Sequence[Adapter],
        bindings: Sequence[Binding],
        options: Mapping[str, Any],
        previous: Provenance | None = None,
    ) -> Provenance:
        """The record of a fold of ``bindings``."""
        told = [
            {"name": one.name, "format": one.format, "digest": f"sha256:{one.digest}", "weight": one.weight}
            for one in adapters
        ]
        sites = [
            {
                "name": binding.site.name,
                "initializer": binding.site.initializer,
                "kind": binding.delta.kind,
                "rank": binding.delta.rank,
                "scale": binding.delta.scale,
                "adapter": binding.adapter,
            }
            for binding in bindings
        ]
        versions = {"loracc": __version__, **{name: version(name) for name in _PACKAGES}}
        chain = previous.to_json() if previous else None
        return cls(base, tuple(told), tuple(sites), dict(options), versions, chain)

    def to_json(self) -> dict[str, Any]:
        """The record as it is written."""
        body = {"schema": SCHEMA, **vars(self), "base": vars(self.base)}
        return {key: value for key, value in body.items() if value is not None}

    def to_text(self) -> str:
        """One line, keys sorted."""
        return json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, where: str) -> Provenance:
        """Read a record.

        Raises:
            InputError: It is none, or of a later version.
        """
        try:
            body = json.loads(text)
            schema = body["schema"]
            if schema != SCHEMA:
                raise InputError(
                    f"{where}: its record of provenance has schema {schema!r}, and this loracc reads {SCHEMA}.",
                    hint="Update loracc.",
                )
            adapters, sites = (tuple(dict(row) for row in body[key]) for key in ("adapters", "sites"))
            options, versions = dict(body["options"]), dict(body["versions"])
            return cls(Identity(**body["base"]), adapters, sites, options, versions, body.get("previous"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: its record of provenance is damaged ({reason}).") from error


def announce_provenance(model: ir.Model) -> None:
    """Keep the place of a record that is stamped while the weights are written, and before the rest is."""
    model.metadata_props[KEY] = ""


def stamp_provenance(model: ir.Model, record: Provenance) -> None:
    """Record in a model what it was made from; targets write it where their format has a place for it."""
    described = [f"{one['name']} {one['format']} {one['digest']}" for one in record.adapters]
    facts = {"adapters": "; ".join(described), "folded": str(len(record.sites)), "version": record.versions["loracc"]}
    stamp(model, {**facts, "provenance": record.to_text()})


def read_provenance(model: BaseModel) -> Provenance | None:
    """What a loaded model says about its making; None when it was not made by loracc.

    Raises:
        InputError: The record is damaged or of a later version.
    """
    text = model.ir.metadata_props.get(KEY)
    if text is not None:
        return Provenance.from_text(text, str(model.path))
    file = model.path / FILE if model.path.is_dir() else None
    if file is None or not file.is_file():
        return None
    try:
        return Provenance.from_text(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}.") from error


def identify(model: BaseModel) -> Identity:
    """A loaded model's identity. A Hugging Face folder's is its checkpoint's, whatever was traced of it."""
    graph = model.ir
    if model.format in ("huggingface", "checkpoint") and model.path.exists():
        from loracc.sources import load_model

        graph = load_model(model.path, LoadOptions(graph=False)).ir
    tensors = _tensors(graph)
    kind = "checkpoint" if model.format == "huggingface" else model.format
    size = sum(int(tensor.nbytes) for tensor in tensors.values())
    return Identity(kind, len(tensors), size, weights_digest(graph))


def weights_digest(model: ir.Model) -> str:
    """The digest of a model's initializers; see the module."""
    tensors = _tensors(model)
    whole = sum(int(tensor.nbytes) for tensor in tensors.values()) <= WHOLE_BYTES
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype.name, list(dims(tensor))]).encode())
        for part in _parts(tensor, whole=whole):
            digest.update(part)
    return f"{'sha256' if whole else 'sha256-sampled'}:{digest.hexdigest()}"


def _tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    values = encoded(model).graph.initializers.items()  # quantized weights as files have them
    return {str(name): value.const_value for name, value in values if value.const_value is not None}


def _parts(tensor: ir.TensorProtocol, *, whole: bool) -> Iterator[Any]:
    shape = dims(tensor)
    if tensor.dtype == ir.DataType.STRING:
        yield json.dumps([str(item) for item in tensor.numpy().ravel()]).encode()
        return
    if 0 in shape:
        return  # and an empty stretch of a file cannot be read: onnx_ir asserts
    if tensor.dtype.bitwidth < 8 or not shape:
        yield tensor.tobytes()
        return
    itemsize = int(tensor.dtype.itemsize)
    if whole or tensor.nbytes <= _RUNS * _RUN_BYTES:
        step = tile_rows(shape, itemsize)
        spans = [(lo, min(lo + step, shape[0])) for lo in range(0, shape[0], step)]
    else:
        step = tile_rows(shape, itemsize, _RUN_BYTES)
        starts = {int(lo) for lo in np.linspace(0, shape[0] - step, _RUNS)}  # np.unique would import numpy.ma
        spans = [(lo, lo + step) for lo in sorted(starts)]
    buffer = np.empty((min(step, shape[0]), *shape[1:]), tensor.dtype.numpy())
    with open_rows(tensor, few=True) as rows:
        for lo, hi in spans:
            part = buffer[: hi - lo]
            rows.fill(lo, hi, part)
            yield part.view(np.uint8).data
