"""How long it takes to find an adapter's weights in a graph without names (``--base``), and in how much memory.

The graph is what an optimizer makes of a decoder: queries, keys and values in one weight, gate and up in another, all
of them transposed and cast to float32, and no name that tells anything. ``--dry-run`` ends after everything is bound
and compared in full.

    python -m tests.benchmarks.binding_time llama-1b
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import onnx_ir as ir

from loracc.concatenated import ConcatenatedTensor
from loracc.model import LoadOptions
from loracc.passes.retype import recast
from loracc.sources.checkpoint import load_checkpoint
from loracc.targets.onnx_file import write_onnx
from loracc.tensors import PermutedTensor, dims
from tests.benchmarks.fold_speed import measure
from tests.benchmarks.workloads import WORKLOADS, make

__all__ = ["write_graph"]

FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def write_graph(base: Path, path: Path) -> None:
    """The graph of a Llama checkpoint, as wide and as deep; only its weights and what reads them are right."""
    tensors = {
        name: value.const_value
        for name, value in load_checkpoint(base, LoadOptions()).ir.graph.initializers.items()
        if value.const_value is not None
    }
    graph = _Graph()
    x = graph.node("Gather", graph.weight(tensors["model.embed_tokens.weight"]), graph.ids)
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    for layer in range(layers):
        for names in FUSED:
            part = "mlp" if names[0] in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            parts = [tensors[f"model.layers.{layer}.{part}.{name}.weight"] for name in names]
            if names[0] in ("q_proj", "gate_proj"):
                norm = "input" if names[0] == "q_proj" else "post_attention"
                x = graph.node("Mul", x, graph.weight(tensors[f"model.layers.{layer}.{norm}_layernorm.weight"]))
            turned = [PermutedTensor(tensor, (1, 0)) for tensor in parts]
            x = graph.node("MatMul", x, graph.weight(ConcatenatedTensor(turned, 1, "fused")))
            if len(parts) > 1:
                x = graph.node("Gather", x, graph.first(dims(parts[0])[0]), axis=2)
    y = graph.node("MatMul", x, graph.weight(PermutedTensor(tensors["lm_head.weight"], (1, 0))))
    write_onnx(graph.model(y), path, external="data")


class _Graph:
    def __init__(self) -> None:
        self.ids = ir.Value(name="ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self._numbers = count()

    def node(self, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"n{next(self._numbers)}")
        node.outputs[0].name = f"val_{next(self._numbers)}"
        self.nodes.append(node)
        return node.outputs[0]

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        return self._initializer(recast(tensor, ir.DataType.FLOAT))

    def first(self, length: int) -> ir.Value:
        return self._initializer(ir.tensor(list(range(length)), dtype=ir.DataType.INT64))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"onnx::MatMul_{next(self._numbers)}"
        value = ir.Value(name=name, shape=ir.Shape(dims(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        return value

    def model(self, output: ir.Value) -> ir.Model:
        output.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [self.ids], [output], nodes=self.nodes, initializers=self.weights, opset_imports={"": 18}, name="decoder"
        )
        return ir.Model(graph, ir_version=10)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Binding by content: time and memory.")
    parser.add_argument("workload", choices=sorted(name for name in WORKLOADS if "llama" in name))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the data here, or use what is here (default: removed after)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loracc-bench-") as name:
        folder = options.keep or Path(name)
        if not (folder / "graph.onnx").is_file():
            make(options.workload, folder)
            write_graph(folder / "base", folder / "graph.onnx")
        if options.rounds == 0:
            return
        fold = [sys.executable, "-m", "loracc", "fold", str(folder / "graph.onnx"), str(folder / "adapter"), "--quiet"]
        command = [*fold, "--base", str(folder / "base"), "-o", str(folder / "out.onnx")]
        size = (folder / "graph.onnx.data").stat().st_size
        print(f"{options.workload}: checkpoint and graph of {size / 1e9:.2f} GB, {options.rounds} rounds")
        runs = [measure([*command, "--dry-run"]) for _ in range(options.rounds)]
        times = " ".join(f"{run.wall:.2f}" for run in runs)
        wall, peak = statistics.median(run.wall for run in runs), max(run.peak for run in runs)
        cpu = statistics.median(run.cpu for run in runs)
        print(f"bound and compared in full: {wall:.2f} s (median of {times}), CPU {cpu:.2f} s")
        print(f"peak memory {peak / 1e6:.0f} MB")
        alone = subprocess.run(
            [sys.executable, "-c", _ALONE, str(folder / "graph.onnx"), str(folder / "base")],
            check=True,
            capture_output=True,
            text=True,
        )
        print(alone.stdout.strip())


_ALONE = """
import sys, time
from pathlib import Path
from loracc.model import LoadOptions
from loracc.passes.content_sites import match_content
from loracc.sources import load_model
model, base = load_model(Path(sys.argv[1])), load_model(Path(sys.argv[2]), LoadOptions(graph=False))
start = time.perf_counter()
match = match_content(model, base)
print(f"found by samples alone: {len(match.found)} sites in {time.perf_counter() - start:.2f} s")
"""


if __name__ == "__main__":
    main()
