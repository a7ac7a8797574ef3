"""Rounding to nearest and calibrated rounding on held-out text: the tables of docs/rounding.md.

::

    python -m tests.benchmarks.calibrated_rounding --model MINILM_FOLDER --dtype bf16 fp16     # some minutes
    python -m tests.benchmarks.calibrated_rounding --draws 50                          # never worse? tiny models

The text is the standard library's docstrings: a part to calibrate with, another to test on. Deltas are random, of rank
8 and half a percent of the weight's norm, on every linear layer of the encoder. Error is relative (L2), of all outputs,
against the float32 fold. Time and memory are the whole process's, verification left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import loracc
from loracc.calibration_data import calibration_batches
from loracc.dtypes import Array
from loracc.model import BaseModel, LoadOptions
from loracc.runners import OnnxRunner
from loracc.sources import load_model
from loracc.tensors import dims
from loracc.verify_graphs import in_reference
from loracc.verify_metrics import relative_l2
from tests.calibrating import inputs, write_adapter, write_model

__all__ = ["main"]

_RANK, _STRENGTH = 8, 0.005


def docstrings(count: int, *, skip: int = 0) -> list[str]:
    """First paragraphs of the standard library's docstrings, one a line, in the order of the files' names."""
    found = list(dict.fromkeys(_paragraphs()))
    step = len(found) // (2 * count)
    return found[skip : 2 * count * step : 2 * step][:count]


def _paragraphs() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text) > 40:
                    yield text


def random_adapter(model: BaseModel, folder: Path, *, seed: int = 0) -> Path:
    """PEFT's LoRA on every linear layer of the encoder."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    names: list[str] = []
    for site in model.sites:
        tensor = model.ir.graph.initializers[site.initializer].const_value
        if tensor is None or len(dims(tensor)) != 2 or ".layer" not in site.name or "embed" in site.name:
            continue
        weight = site.layout.view(tensor.numpy()).astype(np.float32)
        a = rng.standard_normal((_RANK, weight.shape[1])).astype(np.float32)
        b = rng.standard_normal((weight.shape[0], _RANK)).astype(np.float32)
        b *= np.float32(_STRENGTH * np.linalg.norm(weight) / np.linalg.norm(b @ a))
        module = site.name.removesuffix(".weight")
        names.append(module)
        tensors |= {f"base_model.model.{module}.lora_{x}.weight": v for x, v in (("A", a), ("B", b))}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def outputs(path: Path, feeds: Sequence[dict[str, Array]]) -> dict[str, list[Array]]:
    """Of an ``.onnx`` run in float32 with the weights that it has."""
    import onnx_ir as ir

    graph = in_reference(load_model(path, LoadOptions()).ir, (), ir.DataType.FLOAT).model
    assert isinstance(graph, ir.Model)
    runner = OnnxRunner(graph)
    found = [runner.run(one) for one in feeds]
    return {name: [one[name] for one in found] for name in found[0]}


def worst(ours: dict[str, list[Array]], truth: dict[str, list[Array]]) -> float:
    """The largest relative error of all outputs."""
    return max(relative_l2(ours[name], truth[name]) for name in truth)


def table(model: Path, dtypes: Sequence[str], samples: int, folder: Path) -> None:
    """A row for each dtype."""
    fit, test = folder / "fit.txt", folder / "test.txt"
    fit.write_text("\n".join(docstrings(samples)), encoding="utf-8")
    test.write_text("\n".join(docstrings(samples, skip=1)), encoding="utf-8")
    base = load_model(model, LoadOptions(graph=True))
    adapter = random_adapter(base, folder / "adapter")
    feeds: list[dict[str, Array]] = [dict(batch.inputs) for batch in calibration_batches(base, test, model)]
    exact = folder / "exact.onnx"
    loracc.fold(model, [adapter], exact, dtype="fp32", verify=False)
    truth = outputs(exact, feeds)
    print(f"| dtype | nearest | calibrated | ratio | nearest s | calibrated s |\n|{'---|' * 6}")
    for dtype in dtypes:
        made: dict[str, tuple[float, float]] = {}
        for rounding, more in (("nearest", {}), ("calibrated", {"calibrate": fit, "tokenizer": model})):
            start, out = time.perf_counter(), folder / f"{dtype}-{rounding}.onnx"
            options: dict[str, Any] = dict(more)
            loracc.fold(model, [adapter], out, dtype=dtype, verify=False, **options)
            made[rounding] = (worst(outputs(out, feeds), truth), time.perf_counter() - start)
        (near, near_s), (chosen, chosen_s) = made["nearest"], made["calibrated"]
        print(f"| {dtype} | {near:.5f} | {chosen:.5f} | {near / chosen:.2f} | {near_s:.1f} | {chosen_s:.1f} |")
    print(f"largest resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def draws(count: int, folder: Path) -> None:
    """Random tiny models, adapters and data: calibrated over nearest's error on inputs that neither has seen."""
    ratios = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        here = folder / str(seed)
        here.mkdir()
        base = write_model(here / "base.onnx", seed=seed)
        adapter = write_adapter(here / "lora", seed=seed + 1, size=float(10 ** rng.uniform(-2.5, -0.5)))
        rank, samples = int(rng.integers(2, 49)), int(rng.integers(16, 400))
        np.savez(here / "data.npz", x=inputs(samples, seed=seed + 2, rank=rank))
        unseen = {"x": inputs(512, seed=seed + 3, rank=rank)}
        paths = [here / f"{name}.onnx" for name in ("exact", "nearest", "chosen")]
        dtype = ("bf16", "fp16")[seed % 2]
        loracc.fold(base, [adapter], paths[0], verify=False)
        loracc.fold(base, [adapter], paths[1], dtype=dtype, verify=False)
        loracc.fold(base, [adapter], paths[2], dtype=dtype, calibrate=here / "data.npz")
        truth, near, chosen = (outputs(path, [unseen]) for path in paths)
        ratios.append(worst(chosen, truth) / worst(near, truth))
    print(f"{count} draws, calibrated error over nearest's: median {np.median(ratios):.3f}, worst {max(ratios):.3f}")


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with its tokenizer")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp16"], choices=["bf16", "fp16"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--draws", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
        if asked.model is not None:
            table(asked.model, asked.dtype, asked.samples, Path(folder))
        if asked.draws:
            draws(asked.draws, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
