"""Everything that docs/benchmarks.md says of folding speed, measured in one run, which rewrites that page.

::

    python -m tests.benchmarks.fold_must_show                 # 20 to 30 minutes, 20 GB of disk
    python -m tests.benchmarks.fold_must_show --only fold sha # some of it, printed and not written

Contenders run alternately, each as a process of its own, after a sync, with free memory touched and the output of the
one before removed; inputs are in the page cache. Medians, and medians of the paired ratios. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import ml_dtypes
import numpy as np

from loracc.kernel import has_kernel
from tests.benchmarks.fold_speed import PEFT, Run, measure, settle, table, warm
from tests.benchmarks.workloads import export_base, make, make_adapter

__all__ = ["main"]

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- fold_must_show: begin -->", "<!-- fold_must_show: end -->"

_PEFT_ONNX = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().eval()
model.config.use_cache = False
ids = torch.ones(2, 16, dtype=torch.int64)
dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
program = torch.onnx.export(model, (), kwargs={"input_ids": ids}, dynamic_shapes=dynamic, dynamo=True)
program.save(sys.argv[3], external_data=True)
"""

_SHA = """
import sys
from pathlib import Path
from loracc.formats import load_adapter
from loracc.lower import lower
from loracc.model import LoadOptions
from loracc.passes.bind_adapter import bind
from loracc.sources import load_model
from loracc.streaming import write_files
from loracc.targets.checkpoint import plan_checkpoint
model = load_model(sys.argv[1], LoadOptions(graph=False))
bind(model, [load_adapter(sys.argv[2])])
plan = plan_checkpoint(lower(model), Path(sys.argv[3]), folder=True)
Path(sys.argv[3]).mkdir()
write_files(plan.weights, tile_bytes=int(sys.argv[4]), workers=int(sys.argv[5]))
"""


def loracc(*arguments: object) -> list[str]:
    """The command line, as a process."""
    return [sys.executable, "-m", "loracc", *map(str, arguments)]


def alternately(commands: dict[str, Sequence[str]], count: int, outputs: Sequence[Path]) -> dict[str, list[Run]]:
    """Every command once a round; ``outputs`` are removed in between."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for index in range(count):
        for name, command in commands.items():
            settle()
            runs[name].append(measure(command))
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            print(f"round {index + 1} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def fold(folder: Path, rounds: int) -> Iterator[str]:
    """1.1B checkpoint to checkpoint, beside cp and PEFT."""
    base, adapter, out = llama(folder), folder / "llama" / "adapter", folder / "out"
    warm(folder / "llama")
    commands: dict[str, Sequence[str]] = {
        "cp -r": ["cp", "-r", str(base), str(out)],
        "loracc fold --no-verify": loracc("fold", base, adapter, "-o", out, "--no-verify"),
        "PEFT load, merge, save": [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)],
    }
    runs = alternately(commands, rounds, [out])
    yield "## 1.1B checkpoint to checkpoint\n"
    yield "TinyLlama's shapes in bfloat16 (2.2 GB), rank 16 on all seven projections. Goals: 1.5 times `cp -r`, 120 MB,"
    yield "a tenth of PEFT's time.\n"
    yield table(runs, size_of(base))
    ours, theirs = runs["loracc fold --no-verify"], runs["PEFT load, merge, save"]
    ratios = sorted(theirs[i].wall / ours[i].wall for i in range(rounds))
    verified = alternately({"": loracc("fold", base, adapter, "-o", out)}, 1, [out])[""][0]
    yield f"\nPEFT takes {ratios[rounds // 2]:.1f} times as long as loracc (median of pairs).\n"
    yield "With verification, which computes every weight again in float64 by another way, one run took "
    yield f"{verified.wall:.0f} s ({verified.cpu:.0f} s of CPU time, {verified.peak / 1e6:.0f} MB).\n"


def onnx(folder: Path, rounds: int) -> Iterator[str]:
    """1.1B ONNX to ONNX with external data."""
    base = onnx_base(folder)
    adapter, out = folder / "llama" / "adapter", folder / "made"
    out.mkdir(exist_ok=True)
    warm(base.parent)
    target = out / "out.onnx"
    commands: dict[str, Sequence[str]] = {
        "cp -r": ["cp", "-r", str(base.parent), str(out / "copy")],
        "loracc fold --no-verify": loracc("fold", base, adapter, "-o", target, "--data", "data", "--no-verify"),
    }
    runs = alternately(commands, rounds, [out / "copy", target, out / "out.onnx.data"])
    yield "## 1.1B ONNX to ONNX\n"
    yield "The same model as ONNX with external data, its linear weights stored transposed. Goal: 1.5 times `cp`.\n"
    yield table(runs, size_of(base.parent)) + "\n"


def huggingface(folder: Path, rounds: int) -> Iterator[str]:
    """1.1B Hugging Face folder to ONNX, beside PEFT and torch's exporter."""
    base, adapter, out = llama(folder), folder / "llama" / "adapter", folder / "made"
    out.mkdir(exist_ok=True)
    warm(folder / "llama")
    target = out / "out.onnx"
    commands: dict[str, Sequence[str]] = {
        "PEFT merge, torch.onnx.export, save": [sys.executable, "-c", _PEFT_ONNX, *map(str, (base, adapter, target))],
        "loracc fold --no-verify": loracc("fold", base, adapter, "-o", target, "--no-verify"),
    }
    runs = alternately(commands, min(rounds, 3), [target, out / "out.onnx.data"])
    yield "## 1.1B Hugging Face folder to ONNX\n"
    yield "Goals: 0.6 of the time, 800 MB.\n"
    yield table(runs, size_of(base), reference="PEFT merge, torch.onnx.export, save") + "\n"


def sparse(folder: Path, _rounds: int) -> Iterator[str]:
    """7B, of holes: the output is written in full where it is computed."""
    made = folder / "sparse"
    make("llama-7b-sparse", made)
    base, adapter, out = made / "base", made / "adapter", folder / "out"
    commands: dict[str, Sequence[str]] = {
        "cp -r --sparse=never": ["cp", "-r", "--sparse=never", str(base), str(out)],
        "loracc fold --no-verify": loracc("fold", base, adapter, "-o", out, "--no-verify"),
    }
    runs = alternately(commands, 1, [out])
    yield "## 7B checkpoint of holes\n"
    yield "Llama 2 7B's shapes in bfloat16 (13.5 GB written): more than the page cache takes at once, so the disk sets"
    yield "the pace. Goal: 120 MB.\n"
    yield table(runs, size_of(base), reference="cp -r --sparse=never") + "\n"
    shutil.rmtree(made)


def dry(folder: Path, rounds: int) -> Iterator[str]:
    """175B, planned only."""
    made = folder / "gpt3"
    make("gpt3-175b-sparse", made)
    base, adapter = made / "base", made / "adapter"
    command = loracc("fold", base, adapter, "-o", made / "out", "--dry-run")
    runs = [measure(command) for _ in range(rounds)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    about = subprocess.run(loracc("inspect", adapter), capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.rstrip() for line in about if line.startswith(("parameters", "kinds", "ranks"))]
    yield "## 175B, planned\n"
    yield "GPT-3's layout (96 layers, d 12288), r = 4 on q and v, in 36 sparse shards. LoRA's paper, section 4.2:"
    yield "18.9 M trainable parameters, 35 MB. Goal: 2 s.\n"
    yield "```"
    yield f"$ loracc inspect adapter     # {size_of(adapter):,} bytes, with its configuration"
    yield from found
    yield "$ loracc fold base adapter -o out --dry-run"
    yield from (line.replace(str(made), "").rstrip() for line in said[-5:])
    yield "```\n"
    walls = sorted(run.wall for run in runs)
    yield f"{walls[len(walls) // 2]:.2f} s (median of {rounds}), {max(run.peak for run in runs) / 1e6:.0f} MB.\n"
    shutil.rmtree(made)


def sha(folder: Path, _rounds: int) -> Iterator[str]:
    """The bytes, whatever the tiles and the workers."""
    base, adapter, out = llama(folder), folder / "llama" / "adapter", folder / "out"
    yield "## The same bytes\n"
    yield "sha256 of the 1.1B checkpoint's weights, by tile size and workers:\n"
    yield "| | 1 worker | 2 workers | 4 workers |"
    yield "|---|---|---|---|"
    for name, tile in (("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("16 MiB", 16 << 20)):
        cells = []
        for workers in (1, 2, 4):
            arguments = map(str, (base, adapter, out, tile, workers))
            subprocess.run([sys.executable, "-c", _SHA, *arguments], check=True)
            with open(out / "model.safetensors", "rb") as file:
                cells.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
            shutil.rmtree(out)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def link(folder: Path, _rounds: int) -> Iterator[str]:
    """A hundred variants that share the base's data file."""
    home = folder / "link"
    home.mkdir()
    base = export_base("gpt2-124m", home / "base.onnx")
    whole = size_of(home)
    adapter = make_adapter("gpt2-124m", home / "adapter", targets=("attn.c_proj",), rank=8)
    for index in range(100):
        command = loracc("fold", base, adapter, "-o", home / f"v{index}.onnx", "--data", "link", "--no-verify", "-q")
        subprocess.run(command, check=True)
    used = sum(path.stat().st_blocks * 512 for path in home.glob("v*"))
    changed = 12 * 768 * 768 * 4
    yield "## A hundred variants of one base\n"
    yield f"GPT-2 124M as ONNX ({whole / 1e6:.0f} MB), an adapter on `attn.c_proj` ({changed / 1e6:.1f} MB change)"
    yield "folded a hundred times with `--data-layout link`: "
    yield f"{used / 1e6:.0f} MB on the disk, {used / 100 / 1e6:.1f} MB a variant, where copies would take "
    yield f"{whole / 1e7:.1f} GB.\n"
    shutil.rmtree(home)


def llama(folder: Path) -> Path:
    """The 1.1B base, made once."""
    if not (folder / "llama").exists():
        make("llama-1b", folder / "llama")
    return folder / "llama" / "base"


def onnx_base(folder: Path) -> Path:
    """The 1.1B base as ONNX, made once."""
    llama(folder)
    path = folder / "onnx" / "base.onnx"
    if not path.exists():
        path.parent.mkdir()
        export_base("llama-1b", path)
    return path


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


PARTS: dict[str, Callable[[Path, int], Iterator[str]]] = {
    "fold": fold,
    "onnx": onnx,
    "hf": huggingface,
    "sha": sha,
    "dry": dry,
    "link": link,
    "sparse": sparse,
}


def header(rounds: int) -> Iterator[str]:
    """What the numbers were made with."""
    from importlib.metadata import version

    kernel = has_kernel(np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
    yield f"{os.cpu_count()} cores ({platform.machine()}), {date.today()}, loracc {version('loracc')} "
    yield f"{'with' if kernel else '**without**'} its compiled kernel, PEFT {version('peft')}, "
    yield f"torch {version('torch')}; {rounds} rounds.\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what docs/benchmarks.md says of folding, and rewrite it.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="these parts, printed and not written")
    parser.add_argument("--folder", type=Path, help="where to make the data (default: a temporary folder, removed)")
    options = parser.parse_args()
    place = contextlib.nullcontext(str(options.folder)) if options.folder else tempfile.TemporaryDirectory()
    with place as name:
        folder = Path(name)
        parts = [line for part in options.only or PARTS for line in PARTS[part](folder, options.rounds)]
    text = "\n".join([*header(options.rounds), *parts])
    print(text)
    if not options.only:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
