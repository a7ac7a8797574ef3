"""``python -m tests.gpu.check --out DIR``: numbers, structure and latency on whatever this machine has.

Everything goes through loracc's own functions: the base is exported to ``.onnx`` and ``.pt2``, an adapter is folded
into both, ``loracc verify`` judges, every runner runs base, folded, unfolded, AdapterL and AdapterH. A runner that
cannot run here has a row that says why. No network; weights are drawn on the device. Writes ``DIR/results.json`` and
``DIR/table.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from loracc.bench_grid import BenchOptions, bench_models
from loracc.devices import gpu_name
from loracc.engines.build import build_trt
from loracc.errors import LoraccError
from loracc.pipeline import fold
from loracc.proof.plans import compare_plans
from loracc.proving import verify
from loracc.runners.runner import open_runner
from tests.gpu.models import ALPHA, PAPER, RANK, TINY, VARIANTS, Setting, Size, gpt2, lora_factors

__all__ = ["check", "main"]

#: Runner -> the kind of file that it runs.
RUNNERS = {"cpu": ".onnx", "torch-cpu": ".pt2", "cuda": ".onnx", "torch-cuda": ".pt2", "tensorrt": ".engine"}
MODELS = ("base", "folded", *VARIANTS[1:])
#: As in VerifyOptions: how many times as wrong as the unfused model, and how many roundoffs, are no failure.
_MULTIPLE, _FLOOR = 4.0, 8.0

Row = dict[str, Any]


def check(out: Path, *, fast: bool, seconds: float, processes: int) -> list[Row]:
    """All rows; see the module's docstring.

    Args:
        out: Folder for the results.
        fast: The tiny size, whatever the machine has.
        seconds, processes: Of each latency comparison.
    """
    gpu = gpu_name()
    size, settings = TINY if fast or gpu is None else PAPER
    rows: list[Row] = []
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="loracc-check-", dir=out) as folder:
            made = _made(Path(folder), size, setting, "cuda" if gpu else "cpu")
            rows += list(_rows(Path(folder), size, setting, gpu, made, seconds, processes))
    return rows


def _made(folder: Path, size: Size, setting: Setting, device: str) -> Row:
    """Write every model and the adapter; returns the float64 reference and the inputs."""
    ids = torch.randint(size.vocabulary, (setting.batch, setting.sequence), generator=torch.Generator().manual_seed(0))
    reference: Any = None
    for variant in VARIANTS:
        model = gpt2(size, variant, setting, device)
        if variant == "unfolded":
            save_file(lora_factors(model), _adapter(folder) / "adapter_model.safetensors")
            reference = model.double()(ids.to(device)).cpu().numpy()
            model = model.float()
        _export(model.cpu(), folder / variant, ids)
    for kind in (".onnx", ".pt2"):
        fold(folder / f"base{kind}", [folder / "adapter"], folder / f"folded{kind}", verify=False)
    return {"ids": ids.numpy(), "reference": reference}


def _adapter(folder: Path) -> Path:
    path = folder / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q", "v"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _export(model: torch.nn.Module, stem: Path, ids: torch.Tensor) -> None:
    """``.pt2`` and ``.onnx`` of fixed shapes: a device captures a graph of those."""
    program = torch.export.export(model, (ids,))
    torch.export.save(program, stem.with_suffix(".pt2"))
    exported = torch.onnx.export(program, dynamo=True, external_data=True, optimize=False, verbose=False)
    assert exported is not None
    exported.save(stem.with_suffix(".onnx"), external_data=True)


def _rows(
    folder: Path, size: Size, setting: Setting, gpu: str | None, made: Row, seconds: float, processes: int
) -> Iterator[Row]:
    where = {"setting": f"{setting.batch}x{setting.sequence}", "layers": size.layers, "width": size.width}
    yield from _told(where, "verify", lambda: _verified(folder))
    for runner, kind in RUNNERS.items():
        told = {**where, "runner": runner}
        if gpu is None and runner in ("cuda", "torch-cuda", "tensorrt"):
            yield {**told, "status": "not run", "reason": "no CUDA device on this machine"}
        elif gpu is not None and runner in ("cpu", "torch-cpu") and size.layers > 2:
            yield {**told, "status": "not run", "reason": "the paper's size is for the GPU; --fast runs on the CPU too"}
        else:
            yield from _of_runner(folder, told, runner, kind, made, seconds, processes)


def _of_runner(
    folder: Path, told: Row, runner: str, kind: str, made: Row, seconds: float, processes: int
) -> Iterator[Row]:
    if kind == ".engine":
        yield from _told(told, "structure", lambda: _engines(folder))
    yield from _told(told, "numbers", lambda: _numbers(folder, runner, kind, made))
    if not processes:
        yield {**told, "check": "latency", "status": "not run", "reason": "not asked for: --processes 0"}
        return
    yield from _told(told, "latency", lambda: _latency(folder, runner, kind, seconds, processes))


def _told(told: Row, what: str, run: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of one check; where it cannot be made here, a row that says why."""
    try:
        for row in run():
            yield {**told, "check": what, "status": "run", **row}
    except (LoraccError, RuntimeError) as error:  # torch says "out of memory" so
        yield {**told, "check": what, "status": "not run", "reason": str(error).splitlines()[0]}


def _verified(folder: Path) -> Iterator[Row]:
    """``loracc verify`` on both kinds, on the CPU: every weight, the graph, and the outputs."""
    for kind in (".onnx", ".pt2"):
        found = verify(folder / f"base{kind}", folder / f"folded{kind}", [folder / "adapter"])
        for name in ("numbers", "structure"):
            part = getattr(found, name)
            yield {"model": f"folded{kind}", "check": name, "verdict": part.verdict, "reason": part.reason}


def _numbers(folder: Path, runner: str, kind: str, made: Row) -> Iterator[Row]:
    """Each against the unfolded model in float64: max|y − reference| / max|reference|."""
    errors = {}
    for name in ("unfolded", "folded", "base"):
        (found,) = open_runner(folder / f"{name}{kind}", runner).run({"input_ids": made["ids"]}).values()
        reference = made["reference"]
        errors[name] = float(np.max(np.abs(found.astype(np.float64) - reference)) / np.max(np.abs(reference)))
    tolerance = max(_MULTIPLE * errors["unfolded"], _FLOOR * 2.0**-24)
    signal = errors["base"] > tolerance
    verdict = "pass" if errors["folded"] <= tolerance and signal else "fail"
    yield {"model": "folded", "verdict": verdict, "error": errors["folded"], "unfolded_error": errors["unfolded"],
           "effect": errors["base"], "tolerance": tolerance}  # fmt: skip


def _engines(folder: Path) -> Iterator[Row]:
    """Plans of everything; the folded one beside the base's, byte for byte and layer for layer."""
    from loracc.targets.tensorrt_load import load_engine

    for name in MODELS:
        like = folder / "base.engine" if name == "folded" else None
        build_trt(folder / f"{name}.onnx", (), folder / f"{name}.engine", like=like)
    found = compare_plans(folder / "base.engine", folder / "folded.engine")
    yield {"model": "folded", "verdict": found.verdict, "reason": found.reason, "outside": found.outside}
    layers = [load_engine(folder / f"{name}.engine", "list an engine's layers").layers() for name in ("base", "folded")]
    verdict = "pass" if layers[0] == layers[1] else "fail"
    yield {"model": "folded", "verdict": verdict, "reason": f"{len(layers[0])} and {len(layers[1])} layers, in order"}


def _latency(folder: Path, runner: str, kind: str, seconds: float, processes: int) -> Iterator[Row]:
    """Every model against the base; the base's row is a second copy of it: the noise."""
    options = BenchOptions(provider=runner, seconds=seconds, processes=processes, threads=0)
    for name, row in zip(MODELS, bench_models([folder / f"{name}{kind}" for name in MODELS], options), strict=True):
        kept = ("median_ms", "ratio", "interval", "noise_floor", "margin", "verdict", "reason")
        yield {"model": name, **{key: row[key] for key in kept}, "runner_name": row["runner"]}


def table(rows: list[Row], about: str) -> str:
    """The rows as Markdown."""
    lines = [about, "", "| setting | runner | check | model | verdict | what |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["status"] == "not run":
            what, verdict = row["reason"], "not run"
        elif "ratio" in row:
            low, high = row["interval"]
            what = f"{row['median_ms']:.3f} ms, ratio {row['ratio']:.4f} [{low:.4f}, {high:.4f}]"
            verdict = row["verdict"]
        elif "error" in row:
            what = f"error {row['error']:.2e}, unfolded {row['unfolded_error']:.2e}, tolerance {row['tolerance']:.2e}"
            verdict = row["verdict"]
        else:
            what, verdict = row.get("reason", ""), row["verdict"]
        cells = (
            row["setting"],
            row.get("runner", "loracc verify"),
            row.get("check", ""),
            row.get("model", ""),
            verdict,
            what,
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit code 1 when the folded model failed a check (a noisy latency is no failure)."""
    parser = argparse.ArgumentParser(description="Numbers, structure and latency on whatever this machine has.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and table.md")
    parser.add_argument("--fast", action="store_true", help="the tiny size; the default where there is no GPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each latency comparison")
    parser.add_argument("--processes", type=int, default=4, help="processes for each latency comparison; 0: none")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    about = f"GPU: {gpu_name()}; torch {torch.__version__}; Python {platform.python_version()}"
    rows = check(options.out, fast=options.fast, seconds=options.seconds, processes=options.processes)
    (options.out / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    text = table(rows, about)
    (options.out / "table.md").write_text(text)
    print(text)
    return int(any(row.get("verdict") == "fail" and str(row.get("model", "")).startswith("folded") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
