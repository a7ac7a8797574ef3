"""GPT-2 as ONNX graphs with random weights: the base, LoRA beside its weights, and two kinds of bottleneck adapters.

Latency does not depend on the values of weights, so none are trained and none are fetched. The architecture is GPT-2's
(Radford et al. 2019): pre-norm blocks, one fused weight for q, k and v, a tanh-approximated GELU, a head tied to the
token embedding. What is put in, as in table 1 of the LoRA paper (Hu et al. 2021, section 5.1 for the names):

* LoRA: q and v at rank 4. Unfolded, both are one branch beside the fused weight: A is [d, 2r], and B [2r, 3d] is zero
  where it would write to k.
* Adapter^H (Houlsby et al. 2019): d -> r -> d with a non-linearity, after attention and after the MLP.
* Adapter^L (Lin et al. 2020): the same after the MLP only, with a layer norm of its own before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["Config", "adapter_parameters", "save"]


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are GPT-2 medium's, and the ranks those that give the paper's parameter counts."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50257
    positions: int = 1024
    lora_rank: int = 4
    rank_l: int = 224
    rank_h: int = 112


def adapter_parameters(config: Config, kind: str) -> int:
    """Trainable parameters of a variant: "lora", "adapter_l", "adapter_h".

    LoRA: 2·d·r for each of q and v in each layer. Adapters (the paper's section 5.1): for each one 2·d·r + r + d, and
    2·d for each layer norm that is trained.

    >>> adapter_parameters(Config(), "lora"), adapter_parameters(Config(), "adapter_l")
    (393216, 11089152)
    """
    d, layers = config.width, config.layers
    if kind == "lora":
        return layers * 2 * 2 * d * config.lora_rank
    if kind == "adapter_l":
        return layers * (2 * d * config.rank_l + config.rank_l + d + 2 * d)
    return layers * 2 * (2 * d * config.rank_h + config.rank_h + d)


class _Writer:
    """Nodes and weights in the order of the computation."""

    def __init__(self, config: Config, kind: str) -> None:
        self.config, self.kind = config, kind
        self.rng = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}

    def weight(self, name: str, *shape: int, scale: float = 0.02) -> ir.Value:
        array = (self.rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float32)
        return self.constant(name, array)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self.weights[name] = value
        return value

    def shape(self, *numbers: int) -> ir.Value:
        name = "shape_" + "_".join(map(str, numbers))
        return self.weights.get(name) or self.constant(name, np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        name = f"number_{value:g}"
        return self.weights.get(name) or self.constant(name, np.array(value, np.float32))

    def op(self, kind: str, *inputs: ir.Value, name: str = "", **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=name or f"{kind}_{len(self.nodes)}")  # type: ignore[arg-type]
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, name: str, inside: int, outside: int) -> ir.Value:
        product = self.op("MatMul", x, self.weight(f"{name}.weight", inside, outside), name=f"/{name}/MatMul")
        return self.op("Add", product, self.weight(f"{name}.bias", outside))

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        ones = self.constant(f"{name}.weight", np.ones(self.config.width, np.float32))
        return self.op("LayerNormalization", x, ones, self.weight(f"{name}.bias", self.config.width), axis=-1)

    def gelu(self, x: ir.Value) -> ir.Value:
        return self.op("Gelu", x, approximate="tanh")

    def bottleneck(self, x: ir.Value, name: str, rank: int) -> ir.Value:
        d = self.config.width
        inside = self.op("Relu", self.linear(x, f"{name}.down", d, rank))
        return self.op("Add", x, self.linear(inside, f"{name}.up", rank, d))

    def attention(self, x: ir.Value, name: str) -> ir.Value:
        d, heads = self.config.width, self.config.heads
        mixed = self.linear(x, f"{name}.c_attn", d, 3 * d)
        if self.kind == "lora":
            mixed = self.op("Add", mixed, self.branch(x, f"{name}.c_attn"))
        split = ir.node("Split", [mixed, self.shape(d, d, d)], attributes={"axis": -1}, num_outputs=3)
        for index, value in enumerate(split.outputs):
            value.name = f"{name}.{'qkv'[index]}"
        self.nodes.append(split)
        q, k, v = (self.op("Reshape", part, self.shape(0, 0, heads, d // heads)) for part in split.outputs)
        q, v = (self.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = self.op("Add", self.op("Mul", scores, self.number((d // heads) ** -0.5)), self.mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        mixed = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.shape(0, 0, d))
        return self.linear(mixed, f"{name}.c_proj", d, d)

    def branch(self, x: ir.Value, name: str) -> ir.Value:
        d, r = self.config.width, self.config.lora_rank
        a = self.weight(f"{name}.lora_A", d, 2 * r)
        b = np.zeros((2 * r, 3 * d), np.float32)
        b[:r, :d], b[r:, 2 * d :] = (self.rng.standard_normal((2, r, d)) * 0.02).astype(np.float32)
        return self.op("MatMul", self.op("MatMul", x, a), self.constant(f"{name}.lora_B", b))

    def block(self, x: ir.Value, name: str) -> ir.Value:
        d = self.config.width
        mixed = self.attention(self.norm(x, f"{name}.ln_1"), f"{name}.attn")
        if self.kind == "adapter_h":
            mixed = self.bottleneck(mixed, f"{name}.adapter_1", self.config.rank_h)
        x = self.op("Add", x, mixed)
        inside = self.gelu(self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc", d, 4 * d))
        mixed = self.linear(inside, f"{name}.mlp.c_proj", 4 * d, d)
        if self.kind == "adapter_h":
            mixed = self.bottleneck(mixed, f"{name}.adapter_2", self.config.rank_h)
        if self.kind == "adapter_l":
            mixed = self.bottleneck(self.norm(mixed, f"{name}.adapter_ln"), f"{name}.adapter", self.config.rank_l)
        return self.op("Add", x, mixed)

    def causal(self, ids: ir.Value) -> ir.Value:
        """A [s, s] mask of zeros and large negative numbers."""
        length = self.op("Shape", ids, start=1, end=2)
        square = self.op("Concat", length, length, axis=0)
        large = ir.tensor(np.array([-1e9], np.float32))
        return self.op(
            "Trilu", self.op("ConstantOfShape", square, value=large), self.constant("one", np.array(1)), upper=1
        )

    def model(self) -> ir.Model:
        config = self.config
        ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
        self.mask = self.causal(ids)
        table = self.weight("wte.weight", config.vocabulary, config.width)
        length = self.op("Squeeze", self.op("Shape", ids, start=1, end=2))
        zero = self.constant("zero", np.array(0))
        places = self.op("Range", zero, length, self.weights["one"])
        position = self.op("Gather", self.weight("wpe.weight", config.positions, config.width), places)
        x = self.op("Add", self.op("Gather", table, ids), position)
        for layer in range(config.layers):
            x = self.block(x, f"h.{layer}")
        logits = self.op("MatMul", self.norm(x, "ln_f"), self.op("Transpose", table, perm=[1, 0]))
        logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["batch", "sequence", config.vocabulary])
        weights = self.weights.values()
        graph = ir.Graph(
            [ids], [logits], nodes=self.nodes, initializers=weights, opset_imports={"": 20}, name=f"gpt2_{self.kind}"
        )
        return ir.Model(graph, ir_version=10)


def save(config: Config, kind: str, folder: Path) -> Path:
    """Write a variant ("base", "lora", "adapter_l", "adapter_h") and return its path."""
    path = folder / f"{kind}.onnx"
    ir.save(_Writer(config, kind).model(), path, external_data=f"{path.name}.data")
    return path
