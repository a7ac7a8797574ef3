"""Faults planted in correct folds, and correct folds at random: what the verifier is measured on.

Each fault takes a base and its bindings and returns the graph that a broken tool would have written. The bindings that
the verifier is given are the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.deltas import DoRA, LowRank, Replacement
from loracc.dtypes import Array, round_to
from loracc.folded import Binding, FoldedTensor, annotate
from loracc.kinds.hadamard import LoHa
from loracc.kinds.vector import IA3
from loracc.lower import lower
from loracc.model import BaseModel
from loracc.sites import Layout, Site, SiteTable
from loracc.targets.onnx_file import write_onnx
from tests.verifying import HIDDEN, MODELS, VOCABULARY, bind, build, folded, low_rank
from tests.verifying import _Builder as Builder
from tests.verifying import _input as graph_input

__all__ = ["FAULTS", "Fault", "base_of", "bindings_of", "random_fold"]

DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Fault:
    """A mistake and the model it is made on.

    Attributes:
        name: What a person would call it.
        model: "mlp", "attention", "conv", or "fused": a fused QKV and a tied embedding.
        make: The wrong graph.
        dtype: Of the model.
        dora: The deltas are DoRA's.
    """

    name: str
    model: str
    make: Callable[[BaseModel, list[Binding]], ir.Model]
    dtype: ir.DataType = ir.DataType.FLOAT
    dora: bool = False


# -------------------------------------------------------------------------------------------------------------- models


def fused(dtype: ir.DataType, seed: int) -> BaseModel:
    """Attention with one weight for q, k and v, and a head that reads the embedding's table."""
    make = Builder(dtype, seed)
    ids = graph_input("input_ids", ir.DataType.INT64, "batch", "sequence")
    table = make.weight("embed", "embedding", (VOCABULARY, HIDDEN))
    h = make.op("Gather", table, ids)
    qkv = make.weight("qkv", "linear", (HIDDEN, 3 * HIDDEN))
    mixed = make.op("MatMul", h, qkv)
    parts = make.constant("parts", np.array([HIDDEN] * 3, np.int64))
    node = ir.node("Split", [mixed, parts], attributes={"axis": -1}, num_outputs=3, name="split")
    for index, value in enumerate(node.outputs):
        value.name, value.dtype = f"part{index}", dtype
    make.nodes.append(node)
    q, k, v = node.outputs
    scores = make.op("MatMul", q, make.op("Transpose", k, perm=[0, 2, 1]))
    h = make.op("Add", h, make.op("MatMul", make.op("Softmax", scores, axis=-1), v))
    turned = make.op("Transpose", table, perm=[1, 0])
    model = make.model(ids, make.op("MatMul", h, turned), "logits")
    rows = [Layout((1, 0), at * HIDDEN, (at + 1) * HIDDEN) for at in range(3)]
    sites = [Site(f"attn.{name}", "weight", "linear", "qkv.weight", rows[i]) for i, name in enumerate("qkv")]
    readers = [str(node.name) for node in make.nodes if table in node.inputs]
    tied = [
        Site("embed", "weight", "embedding", "embed.weight", consumer=readers[0]),
        Site("head", "weight", "linear", "embed.weight", consumer=readers[1]),
    ]
    return replace(model, sites=SiteTable([*sites, *tied]))


def base_of(model: str, dtype: ir.DataType = ir.DataType.FLOAT, seed: int = 0) -> BaseModel:
    return fused(dtype, seed) if model == "fused" else build(model, dtype, seed)


def bindings_of(base: BaseModel, model: str, *, seed: int = 0, dora: bool = False) -> list[Binding]:
    """Low-rank deltas, or DoRA's on the linear weights."""
    found = bind(base, seed=seed) if model in MODELS else _fused_bindings(base, seed)
    if not dora:
        return found
    rng = np.random.default_rng(seed)
    return [
        replace(b, delta=DoRA(b.delta, np.asarray(0.5 + rng.random(b.delta.b.shape[0]), np.float32)))
        if isinstance(b.delta, LowRank)
        else b
        for b in found
    ]


def _fused_bindings(base: BaseModel, seed: int) -> list[Binding]:
    sites = {site.module: site for site in base.sites}
    both = low_rank((VOCABULARY, HIDDEN), seed=100 * seed + 9)  # a tied weight: one delta, read twice
    deltas = {
        "attn.q": low_rank((HIDDEN, HIDDEN), seed=100 * seed),
        "attn.v": low_rank((HIDDEN, HIDDEN), seed=100 * seed + 1),
        "embed": both,
        "head": both,
    }
    return [Binding(sites[name], delta, "adapter", f"{name}.weight", "name") for name, delta in deltas.items()]


def right(base: BaseModel, bindings: Sequence[Binding]) -> ir.Model:
    """What loracc itself makes of them."""
    copy = replace(base, ir=base.ir.clone())
    annotate(copy.ir, bindings)
    return lower(copy).ir


# -------------------------------------------------------------------------------------------------------------- faults


def _tensor(graph: ir.Model, name: str) -> Array:
    value = graph.graph.initializers[name].const_value
    assert value is not None
    return np.array(value.numpy())


def _put(graph: ir.Model, name: str, array: Array) -> ir.Model:
    graph.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    return graph


def _each(change: Callable[[Any], Any]) -> Callable[[BaseModel, list[Binding]], ir.Model]:
    """Every delta another."""
    return lambda base, bindings: folded(base, [replace(b, delta=change(b.delta)) for b in bindings])


def _first(change: Callable[[Any], Any]) -> Callable[[BaseModel, list[Binding]], ir.Model]:
    """The first delta another."""

    def make(base: BaseModel, bindings: list[Binding]) -> ir.Model:
        return folded(base, [replace(bindings[0], delta=change(bindings[0].delta)), *bindings[1:]])

    return make


def _swapped(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    one, two = bindings[:2]
    return folded(base, [replace(one, delta=two.delta), replace(two, delta=one.delta), *bindings[2:]])


def _rounded_first(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = base.ir.clone()
    for binding in bindings:
        weight = _tensor(base.ir, binding.site.initializer)
        delta = binding.delta.materialize(np.dtype(np.float32)).T.astype(weight.dtype).astype(np.float32)
        dtype = base.ir.graph.initializers[binding.site.initializer].dtype
        assert dtype is not None
        _put(out, binding.site.initializer, round_to(weight.astype(np.float32) + delta, dtype))
    return out


def _through_half(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    name = bindings[0].site.initializer
    return _put(out, name, _tensor(out, name).astype(np.float16).astype(np.float32))


def _wrong_dtype(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """One weight in float16, with the Cast that makes the graph run."""
    out = right(base, bindings)
    value = out.graph.initializers[bindings[0].site.initializer]
    assert value.name is not None
    reader = next(iter(value.uses())).node
    _put(out, value.name, _tensor(out, value.name).astype(np.float16))
    value.dtype = ir.DataType.FLOAT16
    _insert(out, reader, [*reader.inputs].index(value), "Cast", to=int(ir.DataType.FLOAT))
    return out


def _insert(graph: ir.Model, reader: ir.Node, index: int, op: str, **attributes: Any) -> None:
    source = reader.inputs[index]
    node = ir.node(op, [source], attributes=attributes, name="planted")
    node.outputs[0].name, node.outputs[0].dtype = "planted_out", ir.DataType.FLOAT
    reader.replace_input_with(index, node.outputs[0])
    graph.graph.insert_before(reader, node)


def _extra_cast(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    node = next(node for node in out.graph if node.op_type == "Tanh")
    _insert(out, node, 0, "Cast", to=int(ir.DataType.FLOAT))
    return out


def _dummy(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """Work that nothing needs: a product with the identity."""
    out = right(base, bindings)
    weight = ir.Value(name="eye", shape=ir.Shape([HIDDEN, HIDDEN]), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.tensor(np.eye(HIDDEN, dtype=np.float32), name="eye")
    out.graph.register_initializer(weight)
    tanh = next(node for node in out.graph if node.op_type == "Tanh")
    node = ir.node("MatMul", [tanh.inputs[0], weight], name="dummy")
    node.outputs[0].name, node.outputs[0].dtype = "dummy_out", ir.DataType.FLOAT
    out.graph.insert_before(tanh, node)
    tanh.replace_input_with(0, node.outputs[0])
    return out


def _de_fused(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """Three products in place of one: the same numbers, slower."""
    out = right(base, bindings)
    split = next(node for node in out.graph if node.op_type == "Split")
    source = split.inputs[0]
    product = source.producer() if source is not None else None
    assert product is not None
    whole = _tensor(out, "qkv.weight")
    for index, value in enumerate(split.outputs):
        part = np.ascontiguousarray(whole[:, index * HIDDEN : (index + 1) * HIDDEN])
        weight = ir.Value(name=f"w{index}", shape=ir.Shape(part.shape), type=ir.TensorType(ir.DataType.FLOAT))
        weight.const_value = ir.tensor(part, name=f"w{index}")
        out.graph.register_initializer(weight)
        node = ir.node("MatMul", [product.inputs[0], weight], name=f"product{index}")
        node.outputs[0].name, node.outputs[0].dtype = f"product{index}_out", ir.DataType.FLOAT
        out.graph.insert_before(split, node)
        value.replace_all_uses_with(node.outputs[0])
    out.graph.remove([split, product], safe=True)
    return out


def _wrong_axis(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    return folded(base, [replace(b, delta=replace(b.delta, axis=1)) for b in bindings])  # type: ignore[type-var]


def _twice(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """The tied table gets the delta once for each of its readers."""
    out = right(base, bindings)
    value = base.ir.graph.initializers["embed.weight"].const_value
    assert value is not None
    tied = [b for b in bindings if b.site.initializer == "embed.weight"]
    out.graph.initializers["embed.weight"].const_value = FoldedTensor(value, tied)
    return out


def _one_ulp(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    array = _tensor(out, "attn.k.weight")
    array[0, 0] = np.nextafter(array[0, 0], np.float32(9))
    return _put(out, "attn.k.weight", array)


def _one_bit(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    name = bindings[0].site.initializer
    array = _tensor(out, name)
    array.view(np.uint32)[3, 3] ^= 1 << 18
    return _put(out, name, array)


def _other_rows(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """q's delta lands on k's rows."""
    site = next(site for site in base.sites if site.module == "attn.k")
    return right(base, [replace(b, site=site) if b.site.module == "attn.q" else b for b in bindings])


def _attribute(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    node = next(node for node in out.graph if node.op_type == "Softmax")
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    return out


def _activation(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    next(node for node in out.graph if node.op_type == "Tanh").op_type = "Softsign"
    return out


def _other_base(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    """Another checkpoint of the same architecture."""
    return right(replace(base, ir=base_of("mlp", seed=7).ir), bindings)


def _nan(base: BaseModel, bindings: list[Binding]) -> ir.Model:
    out = right(base, bindings)
    array = _tensor(out, bindings[0].site.initializer)
    array[0, 0] = np.nan
    return _put(out, bindings[0].site.initializer, array)


def _turned(delta: Any) -> LowRank:
    return LowRank(np.ascontiguousarray(delta.b.T), np.ascontiguousarray(delta.a.T), delta.s)


def _half_rank(delta: Any) -> LowRank:
    keep = delta.a.shape[0] // 2 + 1
    return LowRank(delta.a[:keep], np.ascontiguousarray(delta.b[:, :keep]), delta.s * delta.a.shape[0] / keep)


def _flipped_kernel(delta: Any) -> LowRank:
    return LowRank(np.ascontiguousarray(delta.a[..., ::-1, ::-1]), delta.b, delta.s)


def _shifted_rows(delta: Any) -> LowRank:
    return LowRank(delta.a, np.roll(delta.b, 1, axis=0), delta.s)


_HALF = ir.DataType.FLOAT16
FAULTS: tuple[Fault, ...] = (
    Fault("scale x 1.01", "attention", _each(lambda delta: delta.scaled(1.01))),
    Fault("scale x 1.01, bf16", "attention", _each(lambda delta: delta.scaled(1.01)), ir.DataType.BFLOAT16),
    Fault("one site skipped", "mlp", lambda base, bindings: folded(base, bindings[:1])),
    Fault("A and B of two layers swapped", "mlp", _swapped),
    Fault("one delta transposed", "mlp", _first(_turned)),
    Fault("delta rounded before adding", "mlp", _rounded_first, _HALF),
    Fault("a weight stored through float16", "mlp", _through_half),
    Fault("wrong dtype: one weight in float16", "mlp", _wrong_dtype),
    Fault("rank pattern ignored", "mlp", _first(_half_rank)),
    Fault("alpha/r for rsLoRA's alpha/sqrt(r)", "mlp", _each(lambda delta: delta.scaled(3**-0.5))),
    Fault("DoRA norm on the wrong axis", "mlp", _wrong_axis, dora=True),
    Fault("DoRA's magnitude ignored", "mlp", _each(lambda delta: delta.inner), dora=True),
    Fault("tied weight changed twice", "fused", _twice),
    Fault("one extra Cast", "mlp", _extra_cast),
    Fault("slower by a dummy op", "mlp", _dummy),
    Fault("a de-fused QKV", "fused", _de_fused),
    Fault("q's delta on k's rows", "fused", _other_rows),
    Fault("sign of one delta", "conv", _first(lambda delta: delta.scaled(-1.0))),
    Fault("every delta folded twice", "conv", _each(lambda delta: delta.scaled(2.0))),
    Fault("kernel of a convolution flipped", "conv", _first(_flipped_kernel)),
    Fault("embedding rows off by one", "attention", _first(_shifted_rows)),
    Fault("one ulp in a weight without a delta", "attention", _one_ulp),
    Fault("one bit of a folded weight", "mlp", _one_bit),
    Fault("folded into another checkpoint", "mlp", _other_base),
    Fault("another attribute (Softmax axis)", "attention", _attribute),
    Fault("a cheaper activation", "mlp", _activation),
    Fault("NaN in one weight", "mlp", _nan),
    Fault("nothing folded at all", "mlp", lambda base, bindings: base.ir.clone()),
)


# --------------------------------------------------------------------------------------------------------- right folds


def random_fold(seed: int, folder: Path) -> tuple[BaseModel, Path, list[Binding], str]:
    """A base, a correct fold of random deltas as loracc writes it, the bindings, and what it is."""
    rng = np.random.default_rng(seed)
    model = ("mlp", "attention", "conv", "fused")[int(rng.integers(4))]
    dtype = DTYPES[int(rng.integers(3))]
    base = base_of(model, dtype, seed)
    strength = float(10 ** rng.uniform(-1.5, 0.3))
    bindings = [
        replace(binding, delta=_random_delta(binding, rng).scaled(strength) if model != "fused" else binding.delta)
        for binding in bindings_of(base, model, seed=seed)
    ]
    kinds = ",".join(sorted({binding.delta.kind for binding in bindings}))
    path = folder / "out.onnx"
    write_onnx(right(base, bindings), path)
    return base, path, bindings, f"{model} {dtype.name.lower()} {kinds} at {strength:.2g}"


def _random_delta(binding: Binding, rng: np.random.Generator) -> Any:
    delta = binding.delta
    assert isinstance(delta, LowRank)
    shape = (delta.b.shape[0], *delta.a.shape[1:])
    kind = rng.choice(["lora", "lora", "dora", "loha", "ia3", "full"])
    if kind == "dora" and binding.site.kind == "linear":
        return _Fixed(DoRA(delta, (0.5 + rng.random(shape[0])).astype(np.float32)))
    if kind == "loha":
        left = (0.4 * rng.standard_normal((shape[0], 2))).astype(np.float32)
        across = (0.4 * rng.standard_normal((2, delta.a[0].size))).astype(np.float32)
        return LoHa(s=0.5, w1_a=left, w1_b=across, w2_a=left[::-1].copy(), w2_b=across[::-1].copy(), rest=shape[1:])
    if kind == "ia3":
        return _Fixed(IA3((1 + 0.2 * rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))).astype(np.float32)))
    if kind == "full":
        return _Fixed(Replacement((rng.standard_normal(shape) / 4).astype(np.float32)))
    return low_rank(shape, r=int(rng.integers(1, 9)), seed=int(rng.integers(1 << 30)))


class _Fixed:
    """A kind that has one strength."""

    def __init__(self, delta: Any) -> None:
        self.delta = delta

    def scaled(self, _weight: float) -> Any:
        return self.delta
