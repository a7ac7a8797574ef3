"""Small models made of nothing but what binding looks at: initializers, nodes that read them, and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.model import BaseModel
from loracc.sites import Site, SiteTable

__all__ = ["adapter_of", "checkpoint", "entry", "low_rank", "tied_graph"]


def values_of(tensors: Mapping[str, Array]) -> list[ir.Value]:
    return [
        ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(array, name=name),
        )
        for name, array in tensors.items()
    ]


def checkpoint(tensors: Mapping[str, Array], sites: Sequence[Site] | None = None) -> BaseModel:
    """A model without nodes; a site for each tensor unless they are given."""
    graph = ir.Graph([], [], nodes=[], initializers=values_of(tensors), opset_imports={"": 18}, name="checkpoint")
    if sites is None:
        parts = [(name, name.rpartition(".")) for name in tensors]
        sites = [Site(module, parameter, "other", name) for name, (module, _, parameter) in parts]
    return BaseModel(Path("base"), "checkpoint", ir.Model(graph, ir_version=10), SiteTable(sites), traced=False)


def tied_graph(embedding: Array) -> tuple[ir.Model, list[Site]]:
    """``h = emb[ids]; y = h @ embᵀ`` with one tensor, and its two sites."""
    (weight,) = values_of({"emb.weight": embedding})
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.Node("", "Gather", [weight, ids], name="/emb/Gather")
    turn = ir.Node("", "Transpose", [weight], name="/head/Transpose")
    product = ir.Node("", "MatMul", [gather.outputs[0], turn.outputs[0]], name="/head/MatMul")
    for node, name in ((gather, "h"), (turn, "t"), (product, "y")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [ids],
        [product.outputs[0]],
        nodes=[gather, turn, product],
        initializers=[weight],
        opset_imports={"": 18},
        name="tied",
    )
    sites = [
        Site("emb", "weight", "embedding", "emb.weight", consumer="/emb/Gather"),
        Site("head", "weight", "linear", "emb.weight", consumer="/head/Transpose"),
    ]
    return ir.Model(graph, ir_version=10), sites


def low_rank(out: int, inner: int, *, seed: int = 0, s: float = 1.0, r: int = 2) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((r, inner)).astype(np.float32), rng.standard_normal((out, r)).astype(np.float32)
    return LowRank(a, b, s)


def entry(name: str, delta: Delta, fan_in_fan_out: bool | None = False) -> Entry:
    module, _, parameter = name.rpartition(".")
    return Entry(module, parameter, delta, (f"file.{name}",), fan_in_fan_out)


def adapter_of(*entries: Entry, name: str = "mine") -> Adapter:
    return Adapter(name, "path", "peft", entries)
