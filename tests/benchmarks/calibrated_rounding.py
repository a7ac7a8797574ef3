"""Calibrated rounding, measured: the tables of docs/rounding.md.

::

    python -m tests.benchmarks.calibrated_rounding minilm gpt2 llama cost --write     # an hour; a part alone, too
    python -m tests.benchmarks.calibrated_rounding --draws 50                          # never worse? tiny models

Each part prints its table, and ``--write`` puts it between its markers in the document. ``--work FOLDER`` keeps what
was trained and exported, so that a second run does not do it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import loracc
from loracc.dtypes import Array
from loracc.model import LoadOptions
from loracc.proof.graphs import in_reference
from loracc.proof.metrics import relative_l2
from loracc.runners.runner import OnnxRunner
from loracc.sources import load_model
from tests.benchmarks.calibrated_cost import cost_rows
from tests.benchmarks.calibrated_tables import language_rows, minilm_rows
from tests.calibrating import inputs, write_adapter, write_model

__all__ = ["main"]

#: Of the base and of the adapter.
_STEPS = (400, 120)
DOCUMENT = Path(__file__).parents[2] / "docs" / "rounding.md"


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


def parts(work: Path) -> dict[str, Callable[[], Iterator[str]]]:
    """The tables by name, as lines."""
    return {
        "minilm": lambda: minilm_rows(work),
        "gpt2": lambda: language_rows("gpt2", work, steps=_STEPS),
        "llama": lambda: language_rows("llama", work, steps=_STEPS),
        "cost": lambda: cost_rows(work),
    }


def written(part: str, lines: Sequence[str]) -> None:
    """Put a table between its markers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = (f"<!-- {part}: {word} -->\n" for word in ("begin", "end"))
    before, rest = text.split(begin)
    DOCUMENT.write_text(
        before + begin + "".join(f"{line}\n" for line in lines) + end + rest.split(end)[1], encoding="utf-8"
    )


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts(Path()), []], default=[])
    parser.add_argument("--work", type=Path, help="a folder to keep models in")
    parser.add_argument("--write", action="store_true", help="into docs/rounding.md")
    parser.add_argument("--draws", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loracc-") as scratch:
        work = asked.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for part in asked.parts:
            lines = []
            for line in parts(work)[part]():
                print(line, flush=True)
                lines.append(line)
            if asked.write:
                written(part, lines)
        if asked.draws:
            draws(asked.draws, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
