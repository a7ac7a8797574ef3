"""What a graph with switchable deltas says about itself, in its metadata: the parameters and what they stand for.

Without it a parameter's name is only a name: ONNX Runtime checks neither that an adapter was made for the graph nor
that all of its parameters belong to it. With it, one can make adapters for the graph after it was exported, refuse
those of another, and take the branches out again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.errors import InputError
from loracc.tensors import dims, read_rows

__all__ = [
    "ADAPTER_IDS",
    "MANIFEST_KEY",
    "Branch",
    "BranchWeight",
    "Manifest",
    "Place",
    "parameter_name",
    "weights_digest",
]

#: Where it is kept (``model.metadata_props``).
MANIFEST_KEY = "loracc.attach"
#: The input of "batched" that says which slot each row of a batch uses.
ADAPTER_IDS = "adapter_ids"
#: Runs of rows, and bytes of them all together, that are read of each weight for its digest.
_RUNS, _RUN_BYTES = 8, 1 << 13


def parameter_name(module: str, role: str) -> str:
    """The name of a factor, "A" or "B", in the files and graphs that loracc writes."""
    return f"{module}.lora_{role}.weight"


@dataclass(frozen=True)
class Place:
    """A site in a weight: ``site`` is "module.parameter", its rows are columns ``start`` to ``stop`` of the product."""

    site: str
    start: int
    stop: int


@dataclass(frozen=True)
class BranchWeight:
    """B of one weight: ``name`` is the graph's input or initializer, ``out`` the columns of the product."""

    name: str
    out: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Branch:
    """A product with A, and the products with B that share it.

    Attributes:
        name: A's input or initializer.
        kind: "linear" or "embedding".
        features: A is ``[features, rank]``.
        weights: B's, ``[rank, out]`` each.
        layout: Of "batched": how the slots lie in them (:mod:`loracc.slot_layout`).
    """

    name: str
    kind: str
    features: int
    weights: tuple[BranchWeight, ...]
    layout: str = ""

    def sites(self) -> Iterator[tuple[BranchWeight, Place]]:
        """Every site, in the order in which their ranks lie side by side."""
        for weight in self.weights:
            for place in weight.places:
                yield weight, place


@dataclass(frozen=True)
class Manifest:
    """The record of one attached graph.

    Attributes:
        mode: "inputs" or "batched".
        base: :func:`weights_digest` of the base.
        dtype: Of the parameters, as ONNX names it ("FLOAT").
        branches: All branches, in the graph's order.
        slots: Of "batched": the name of the adapter in each slot, "" for a free one.
        rank: Of "batched": the rank that every site of a slot has room for.
    """

    mode: str
    base: str
    dtype: str
    branches: tuple[Branch, ...]
    slots: tuple[str, ...] = ()
    rank: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of every A and B, and of the input that chooses slots."""
        names = [name for branch in self.branches for name in (branch.name, *(one.name for one in branch.weights))]
        return tuple(names) if self.mode == "inputs" else (ADAPTER_IDS, *names)

    @property
    def digest(self) -> str:
        """sha256 of what an adapter must fit: everything but what is in the slots."""
        fixed = {**asdict(self), "slots": len(self.slots)}
        return hashlib.sha256(json.dumps(fixed, separators=(",", ":"), sort_keys=True).encode()).hexdigest()

    def to_text(self) -> str:
        """As the graph's metadata hold it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: object) -> Manifest:
        """From a graph's metadata.

        Raises:
            InputError: There is none, or it is malformed.
        """
        text = metadata.get(MANIFEST_KEY)
        if text is None:
            raise InputError(
                f"{path}: no graph with switchable deltas: its metadata have no {MANIFEST_KEY!r}.",
                hint="Make one: loracc attach MODEL ADAPTER -o OUT.onnx",
            )
        try:
            return _parsed(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: its record of switchable deltas is malformed ({type(error).__name__}: {error}).",
                hint="Attach the adapters again.",
            ) from error


def _parsed(body: Any) -> Manifest:
    branches = tuple(
        Branch(
            str(branch["name"]),
            str(branch["kind"]),
            int(branch["features"]),
            tuple(
                BranchWeight(
                    str(weight["name"]),
                    int(weight["out"]),
                    tuple(Place(str(p["site"]), int(p["start"]), int(p["stop"])) for p in weight["places"]),
                )
                for weight in branch["weights"]
            ),
            str(branch["layout"]),
        )
        for branch in body["branches"]
    )
    slots = tuple(str(name) for name in body["slots"])
    dtype = ir.DataType[str(body["dtype"])].name
    return Manifest(str(body["mode"]), str(body["base"]), dtype, branches, slots, int(body["rank"]))


def weights_digest(model: ir.Model, leave_out: frozenset[str] = frozenset()) -> str:
    """sha256 over every initializer: name, type, shape, and evenly spread rows of its values.

    About 8 KiB of each weight are read, so that a model of any size is told from another within a moment. Two models
    that differ only in rows that are not read have one digest.

    Args:
        model: The graph; order of the initializers does not matter.
        leave_out: Names of initializers that are no weights of the base.
    """
    digest = hashlib.sha256()
    for name in sorted(str(n) for n in model.graph.initializers if n not in leave_out):
        tensor = model.graph.initializers[name].const_value
        if tensor is None:
            continue
        shape = dims(tensor)
        digest.update(f"{name}\0{tensor.dtype.name}\0{shape}\0".encode())
        for lo, hi in _sampled(shape, tensor):
            digest.update(_bytes(tensor, lo, hi))
    return digest.hexdigest()


def _sampled(shape: tuple[int, ...], tensor: ir.TensorProtocol) -> list[tuple[int, int]]:
    length = shape[0] if shape else 1
    if tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.STRING:
        return [(0, length)]
    row = max(tensor.nbytes // max(length, 1), 1)
    step = max(_RUN_BYTES // _RUNS // row, 1)
    if step * _RUNS >= length:
        return [(0, length)]
    starts = np.linspace(0, length - step, _RUNS, dtype=np.int64)
    return [(int(lo), int(lo) + step) for lo in starts]


def _bytes(tensor: ir.TensorProtocol, lo: int, hi: int) -> bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    if tensor.dtype.bitwidth < 8:
        return tensor.tobytes()  # several elements a byte: rows have no address of their own
    return np.ascontiguousarray(read_rows(tensor, lo, hi)).tobytes()
