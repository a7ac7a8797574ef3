"""TensorRT plans of base and folded models, built on this machine: sizes, build times, bytes that differ.

``python -m tests.benchmarks.trt_plans [mlp gpt2 minilm]`` prints a Markdown table. For each model and type three plans
are built: of the base, of the base with the adapter folded in memory, and of the folded file. The last two must be
equal byte for byte, and the first two outside the weights. Where the builder numbers fused products anew in each build,
the second and third are built ``like`` the first; the builds that took are counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.dtypes import dtype_from_name
from loracc.engines.build import build_trt
from loracc.lower import lower
from loracc.model import LoadOptions
from loracc.pipeline import fold
from loracc.proof.plans import compare_plans
from loracc.sources import load_model
from loracc.targets.onnx_file import write_onnx
from tests.benchmarks.workloads import make

WIDTH = 256
MODELS = ("mlp", "gpt2", "minilm")
_HEAD = ("model", "base plan, MB", "folded plan, MB", "build, s (base; folded)", "weights changed",
         "bytes inside them", "bytes outside", "= plan of the folded file", "builds")  # fmt: skip


def mlp(folder: Path) -> tuple[Path, Path]:
    """Three layers with random weights, and an adapter for two of them."""
    rng = np.random.default_rng(0)
    names = [f"layers.{index}.weight" for index in range(3)]
    nodes = []
    for index, name in enumerate(names):
        nodes.append(helper.make_node("MatMul", [f"h{index}", name], [f"m{index}"], f"/layers.{index}/MatMul"))
        nodes.append(helper.make_node("Relu", [f"m{index}"], [f"h{index + 1}"], f"/Relu_{index}"))
    weights = [numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), name) for name in names]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("h0", "h3")]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], weights)
    path = folder / "mlp.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["layers.0", "layers.2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.layers.{index}.lora_{side}.weight": rng.standard_normal(shape).astype(np.float32) * 0.1
        for index in (0, 2)
        for side, shape in {"A": (8, WIDTH), "B": (WIDTH, 8)}.items()
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    return path, adapter


def gpt2(folder: Path) -> tuple[Path, Path]:
    """GPT-2's 124M shape, random weights."""
    make("gpt2-124m", folder)
    return folder / "base", folder / "adapter"


def minilm(_folder: Path) -> tuple[Path, Path]:
    """The real all-MiniLM-L6-v2 and the sample's adapter."""
    from samples.minilm.weights import minilm_folder

    return minilm_folder(), Path(__file__).parents[2] / "samples" / "minilm" / "adapter"


def cases(name: str, folder: Path) -> Iterator[tuple[str, Path, Path, Path]]:
    """(label, base.onnx, adapter, folded.onnx) in float32 and float16."""
    source, adapter = {"mlp": mlp, "gpt2": gpt2, "minilm": minilm}[name](folder)
    for dtype in ("fp32", "fp16"):
        base, folded = folder / f"base-{dtype}.onnx", folder / f"folded-{dtype}.onnx"
        loaded = load_model(source, LoadOptions(graph=True))
        write_onnx(lower(loaded, dtype_from_name(dtype)).ir, base)
        # The base is folded as it is on disk: its float16 weights are what an engine of it has.
        fold(base, [adapter], folded, verify=False)
        yield f"{name} {dtype}", base, adapter, folded


def profiles(base: Path, count: int = 1) -> list[str]:
    """Ranges for every dynamic input; the k-th profile takes batches of up to 4^k."""
    found = []
    for value in load_model(base, LoadOptions()).ir.graph.inputs:
        shape = list(value.shape or ())
        if all(isinstance(dim, int) for dim in shape):
            continue
        for index in range(count):
            sizes = ((1, 1), (4**index, 32), (4 ** (index + 1), 128))
            texts = ["x".join(str(_size(dim, axis, size)) for axis, dim in enumerate(shape)) for size in sizes]
            found.append(f"{value.name}:{':'.join(texts)}")
    return found


def _size(dim: object, axis: int, sizes: tuple[int, int]) -> int:
    return dim if isinstance(dim, int) else sizes[min(axis, 1)]


def row(label: str, base: Path, adapter: Path, folded: Path, ranges: Sequence[str]) -> list[str]:
    """Build three plans and compare them."""
    plans = {name: base.with_name(f"{label.replace(' ', '-')}-{name}.engine") for name in ("base", "memory", "file")}
    took, builds = [], []
    for name, (model, adapters) in {
        "base": (base, []),
        "memory": (base, [adapter]),
        "file": (folded, []),
    }.items():
        start = time.perf_counter()
        like = None if name == "base" else plans["base"]
        built = build_trt(model, adapters, plans[name], flavor="rtx", profiles=ranges, like=like)
        took.append((time.perf_counter() - start) / built.builds)
        builds.append(built.builds)
    found = compare_plans(plans["base"], plans["memory"])
    equal = plans["memory"].read_bytes() == plans["file"].read_bytes()
    cells = [
        label,
        *(f"{plans[name].stat().st_size / 1e6:.2f}" for name in ("base", "memory")),
        f"{took[0]:.1f}; {took[1]:.1f}",
        str(len(found.changed)),
        f"{found.inside:,}",
        f"{found.outside:,}" if found.outside is not None else found.reason,
        "yes" if equal else "NO",
        "; ".join(map(str, builds)),
    ]
    for plan in plans.values():
        plan.unlink()
    return cells


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="TensorRT plans of base and folded models.")
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, []])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed)")
    options = parser.parse_args()
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}", flush=True)
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="loracc-plans-", dir=options.folder) as folder:
            for label, base, adapter, folded in cases(name, Path(folder)):
                print(f"| {' | '.join(row(label, base, adapter, folded, profiles(base)))} |", flush=True)
                if name == "mlp":
                    ranges = profiles(base, 3)
                    print(f"| {' | '.join(row(f'{label}, 3 profiles', base, adapter, folded, ranges))} |", flush=True)


if __name__ == "__main__":
    main()
