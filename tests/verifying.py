"""Three tiny graphs in any float type, deltas for them, and folds of them: right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.deltas import LowRank
from loracc.folded import Binding, FoldedTensor
from loracc.model import BaseModel
from loracc.sites import TRANSPOSED, Layout, Site, SiteTable

__all__ = ["MODELS", "bind", "build", "folded", "low_rank", "write"]

HIDDEN, VOCABULARY, CLASSES = 16, 41, 5


class _Builder:
    """Makes nodes and weights of one dtype."""

    def __init__(self, dtype: ir.DataType, seed: int) -> None:
        self.dtype, self.rng = dtype, np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.sites: list[Site] = []

    def weight(self, module: str, kind: str, shape: tuple[int, ...], layout: Layout = Layout()) -> ir.Value:  # noqa: B008
        array = (self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(self.dtype.numpy())
        return self.constant(f"{module}.weight", array, Site(module, "weight", kind, f"{module}.weight", layout))

    def constant(self, name: str, array: np.ndarray, site: Site | None = None) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        self.sites += [site] if site else []
        return value

    def op(self, kind: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"{kind}_{len(self.nodes)}")  # type: ignore[arg-type]
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.outputs[0].dtype = dtype or self.dtype
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, module: str, inside: int, outside: int) -> ir.Value:
        return self.op("MatMul", x, self.weight(module, "linear", (inside, outside), TRANSPOSED))

    def model(self, x: ir.Value, y: ir.Value, name: str) -> BaseModel:
        """The output is cast to float32, so that every runner gives it."""
        y.name, y = "inner", y
        out = self.op("Cast", y, to=int(ir.DataType.FLOAT), dtype=ir.DataType.FLOAT)
        out.name = name
        graph = ir.Graph([x], [out], nodes=self.nodes, initializers=self.weights, opset_imports={"": 18}, name="tiny")
        return BaseModel(Path("tiny.onnx"), "onnx", ir.Model(graph, ir_version=10), SiteTable(self.sites))


def _input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _mlp(dtype: ir.DataType, seed: int) -> BaseModel:
    make = _Builder(dtype, seed)
    x = _input("x", ir.DataType.FLOAT, "batch", HIDDEN)
    h = make.op("Tanh", make.linear(make.op("Cast", x, to=int(dtype)), "fc1", HIDDEN, HIDDEN))
    return make.model(x, make.linear(h, "fc2", HIDDEN, HIDDEN), "y")


def _attention(dtype: ir.DataType, seed: int) -> BaseModel:
    make = _Builder(dtype, seed)
    ids = _input("input_ids", ir.DataType.INT64, "batch", "sequence")
    h = make.op("Gather", make.weight("embed", "embedding", (VOCABULARY, HIDDEN)), ids)
    q, k, v = (make.linear(h, f"attn.{part}", HIDDEN, HIDDEN) for part in "qkv")
    scores = make.op("MatMul", q, make.op("Transpose", k, perm=[0, 2, 1]))
    scale = make.constant("scale", np.array(HIDDEN**-0.5).astype(dtype.numpy()))
    mixed = make.op("MatMul", make.op("Softmax", make.op("Mul", scores, scale), axis=-1), v)
    h = make.op("Add", h, make.linear(mixed, "attn.o", HIDDEN, HIDDEN))
    return make.model(ids, make.linear(h, "head", HIDDEN, VOCABULARY), "logits")


def _convolutions(dtype: ir.DataType, seed: int) -> BaseModel:
    make = _Builder(dtype, seed)
    x = _input("pixels", ir.DataType.FLOAT, "batch", 3, 8, 8)
    first = make.weight("conv1", "conv", (8, 3, 3, 3))
    h = make.op("Conv", make.op("Cast", x, to=int(dtype)), first, pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    second = make.weight("conv2", "conv", (8, 4, 3, 3))
    h = make.op("Conv", make.op("Relu", h), second, group=2, strides=[2, 2], kernel_shape=[3, 3])
    axes = make.constant("axes", np.array([2, 3], np.int64))
    pooled = make.op("ReduceMean", h, axes, keepdims=0)
    return make.model(x, make.linear(pooled, "head", 8, CLASSES), "logits")


#: Name -> (builder, modules that get a delta, in the order of the graph).
MODELS: dict[str, tuple[Callable[[ir.DataType, int], BaseModel], tuple[str, ...]]] = {
    "mlp": (_mlp, ("fc1", "fc2")),
    "attention": (_attention, ("embed", "attn.q", "attn.v", "head")),
    "conv": (_convolutions, ("conv1", "conv2", "head")),
}


def build(name: str, dtype: ir.DataType = ir.DataType.FLOAT, seed: int = 0) -> BaseModel:
    """One of the models with seeded random weights."""
    return MODELS[name][0](dtype, seed)


def low_rank(shape: Sequence[int], *, r: int = 3, strength: float = 0.3, seed: int = 0) -> LowRank:
    """A delta for a canonical shape, in float32, about ``strength`` times as large as a fresh weight."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((r, *shape[1:])).astype(np.float32)
    b = (rng.standard_normal((shape[0], r)) * strength / np.sqrt(r * np.prod(shape[1:]))).astype(np.float32)
    return LowRank(a, b, 2.0)


def bind(model: BaseModel, deltas: Mapping[str, Delta] | None = None, *, seed: int = 0) -> list[Binding]:
    """A delta for each module of the model's list; ``deltas`` replaces some by module."""
    sites = {site.module: site for site in model.sites}
    name = next(name for name, (_, modules) in MODELS.items() if set(modules) <= set(sites))
    found = []
    for index, module in enumerate(MODELS[name][1]):
        value = model.ir.graph.initializers[sites[module].initializer].const_value
        assert value is not None
        shape = sites[module].layout.canonical_shape([int(n) for n in value.shape.numpy()])
        delta = (deltas or {}).get(module) or low_rank(shape, seed=100 * seed + index)
        found.append(Binding(sites[module], delta, "adapter", f"{module}.weight", "name"))
    return found


def folded(model: BaseModel, bindings: Sequence[Binding]) -> ir.Model:
    """A copy with the deltas folded in."""
    copy = model.ir.clone()
    groups: dict[str, list[Binding]] = {}
    for binding in bindings:
        groups.setdefault(binding.site.initializer, []).append(binding)
    for name, here in groups.items():
        value = copy.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = FoldedTensor(value.const_value, here)
    return copy


def write(model: BaseModel, graph: ir.Model, path: Path) -> BaseModel:
    """Save and load again, as a user's file is."""
    ir.save(graph, path)
    return replace(model, path=path, ir=ir.load(path))
