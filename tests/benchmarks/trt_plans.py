"""TensorRT plans of base and folded models, built on this machine; rewrites the table of docs/tensorrt.md.

::

    python -m tests.benchmarks.trt_plans                    # MLP, GPT-2 124M and MiniLM: 10 minutes, 6 GB of disk
    python -m tests.benchmarks.trt_plans mlp minilm         # some of it, printed and not written

For each model and type three plans are built: of the base, of the base with the adapter folded in memory, and of the
folded file. The last two must be equal byte for byte, and the first two outside the weights; the run ends with 1 where
they are not. MLP and MiniLM also with three profiles, and as graphs of ``attach --as inputs`` (ranks from 0 to the
adapter's), base and folded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
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
from loracc.switching.attaching import attach
from loracc.targets.onnx_file import write_onnx
from loracc.targets.tensorrt_module import load_flavor
from tests.benchmarks.workloads import make

WIDTH = 256
MODELS = {"mlp": "MLP", "minilm": "all-MiniLM-L6-v2", "gpt2": "GPT-2 124M"}
RANK = 8
PAGE = Path(__file__).parents[2] / "docs" / "tensorrt.md"
BEGIN, END = "<!-- trt_plans: begin -->", "<!-- trt_plans: end -->"
_HEAD = ("model", "plan, bytes (base; folded)", "build, s (base; folded)", "weights changed",
         "bytes that differ inside them", "outside", "`BASE --adapter` = `FOLDED`")  # fmt: skip


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
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["layers.0", "layers.2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.layers.{index}.lora_{side}.weight": rng.standard_normal(shape).astype(np.float32) * 0.1
        for index in (0, 2)
        for side, shape in {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}.items()
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


@dataclass(frozen=True)
class Case:
    """One row: what the three plans are built from, and with which options."""

    label: str
    base: Path
    adapter: Path
    folded: Path
    profiles: int = 1
    max_rank: int | None = None

    def ranges(self) -> list[str]:
        """Profiles for every dynamic input but switchable factors; the k-th one takes batches of up to 4^k."""
        found = []
        for value in load_model(self.base, LoadOptions()).ir.graph.inputs:
            shape = list(value.shape or ())
            if all(isinstance(dim, int) for dim in shape) or "lora_" in str(value.name):
                continue
            for index in range(self.profiles):
                sizes = ((1, 1), (4**index, 32), (4 ** (index + 1), 128))
                texts = ["x".join(str(_size(dim, axis, size)) for axis, dim in enumerate(shape)) for size in sizes]
                found.append(f"{value.name}:{':'.join(texts)}")
        return found


def cases(name: str, folder: Path) -> Iterator[Case]:
    """In float32 and float16."""
    source, adapter = {"mlp": mlp, "gpt2": gpt2, "minilm": minilm}[name](folder)
    for dtype in ("fp32", "fp16"):
        base, folded = folder / f"base-{dtype}.onnx", folder / f"folded-{dtype}.onnx"
        loaded = load_model(source, LoadOptions(graph=True))
        write_onnx(lower(loaded, dtype_from_name(dtype)).ir, base)
        # The base is folded as it is on disk: its float16 weights are what an engine of it has.
        fold(base, [adapter], folded, verify=False)
        plain = Case(f"{MODELS[name]} {dtype}", base, adapter, folded)
        yield plain
        if name == "gpt2":
            continue
        yield replace(plain, label=f"{plain.label}, 3 profiles", profiles=3)
        made = [path.with_name(f"{path.stem}-attached.onnx") for path in (base, folded)]
        for model, out in zip((base, folded), made, strict=True):
            attach(model, [adapter], out, mode="inputs", verify=False, force=True)
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        attached = replace(plain, label=f"{plain.label}, attached", base=made[0], folded=made[1], max_rank=rank)
        yield attached
        yield replace(attached, label=f"{attached.label}, 3 profiles", profiles=3)


def _size(dim: object, axis: int, sizes: tuple[int, int]) -> int:
    return dim if isinstance(dim, int) else sizes[min(axis, 1)]


def row(case: Case) -> tuple[list[str], bool]:
    """Build three plans and compare them; the cells, and whether they are as they should be."""
    plans = {name: case.base.with_name(f"{name}.engine") for name in ("base", "memory", "file")}
    took = []
    for (name, plan), (model, adapters) in zip(
        plans.items(), [(case.base, []), (case.base, [case.adapter]), (case.folded, [])], strict=True
    ):
        start = time.perf_counter()
        build_trt(model, adapters, plan, flavor="rtx", profiles=case.ranges(), max_rank=case.max_rank)
        took.append(time.perf_counter() - start)
        print(f"{case.label}: {name} built in {took[-1]:.1f} s", file=sys.stderr, flush=True)
    found = compare_plans(plans["base"], plans["memory"])
    equal = plans["memory"].read_bytes() == plans["file"].read_bytes()
    cells = [
        case.label,
        "; ".join(f"{size:,}" for size in found.bytes),
        f"{took[0]:.1f}; {took[1]:.1f}",
        str(len(found.changed)),
        f"{found.inside:,}",
        f"{found.outside:,}" + (f" ({found.verdict}: {found.reason})" if found.reason else ""),
        "yes" if equal else "NO",
    ]
    for plan in plans.values():
        plan.unlink()
        plan.with_name(f"{plan.name}.json").unlink()
    return cells, equal and found.verdict == "pass"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="TensorRT plans of base and folded models.")
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="some of them, printed and not written")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed)")
    options = parser.parse_args()
    lines = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    good = True
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="loracc-plans-", dir=options.folder) as folder:
            for case in cases(name, Path(folder)):
                cells, right = row(case)
                good &= right
                lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if not options.models:
        write(lines)
    return int(not good)


def write(lines: Sequence[str]) -> None:
    """Put the table between its marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    version = load_flavor("rtx").version
    about = (
        f"Measured by `python -m tests.benchmarks.trt_plans` on {date.today():%d %B %Y} with TensorRT for RTX "
        f"{version}, {os.cpu_count()} cores. "
        "Times are of the whole command: reading, folding, building, locating the weights."
    )
    body = "\n".join(["", *textwrap.wrap(about, 120), "", *lines, ""])
    PAGE.write_text(f"{before}{BEGIN}{body}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
