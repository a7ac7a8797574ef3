"""Table 1 of the LoRA paper on this machine: one forward pass of GPT-2 medium, LoRA folded and what stays in the graph.

    python samples/latency_table.py                      smaller settings and 4 of the 24 layers, for a CPU
    python samples/latency_table.py --provider cuda      the paper's own settings and all layers

The folded model is made by ``loracc fold`` from the unfolded graph itself: no adapter file is involved. Expected on any
device: folded is 1.00, the three others are slower, and most so at batch 1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gpt2_graphs import Config, adapter_parameters, save

import loracc

#: (batch, sequence): milliseconds in the paper, table 1, on a Quadro RTX 8000: Fine-Tune/LoRA, Adapter^L, Adapter^H.
PAPER = {(32, 512): (1449.4, 1482.0, 1492.2), (16, 256): (338.0, 354.8, 366.3), (1, 128): (19.8, 23.9, 25.8)}
SMALLER = ((2, 64), (1, 32), (1, 8))
TINY = Config(layers=2, width=32, heads=2, vocabulary=99, positions=32, rank_l=8, rank_h=4)
ROWS = (
    ("base", "base", None),
    ("LoRA, folded", "folded", 0),
    ("LoRA, unfolded", "lora", None),
    ("Adapter^L", "adapter_l", 1),
    ("Adapter^H", "adapter_h", 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--layers", type=int, help="Of 24; default: 4 on a CPU, 24 elsewhere.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Per model and setting.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Keep the models here.")
    parser.add_argument("--fast", action="store_true", help="A tiny model and no time: does everything run?")
    arguments = parser.parse_args()
    on_cpu = arguments.provider.endswith("cpu")
    config = TINY if arguments.fast else Config(layers=arguments.layers or (4 if on_cpu else 24))
    settings = ((1, 8),) if arguments.fast else SMALLER if on_cpu else tuple(PAPER)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        paths = build(config, folder)
        print(f"{config.layers} of 24 layers, width {config.width}, {arguments.provider}")
        for batch, sequence in settings:
            rows = loracc.bench(
                paths, batch=batch, sequence=sequence, provider=arguments.provider, threads=arguments.threads,
                seconds=0.1 if arguments.fast else arguments.seconds,
                processes=1 if arguments.fast else arguments.processes,
            )  # fmt: skip
            show(config, batch, sequence, rows)


def build(config: Config, folder: Path) -> list[Path]:
    """The five models; the folded one by loracc, verified while it is made."""
    for kind in ("base", "lora", "adapter_l", "adapter_h"):
        save(config, kind, folder)
    result = loracc.fold(folder / "lora.onnx", [], folder / "folded.onnx", force=True, external="data")
    assert result.verification is not None
    print(f"folded {len(result.sites)} deltas found in the graph; {result.verification.summary()}")
    return [folder / f"{name}.onnx" for _, name, _ in ROWS]


def show(config: Config, batch: int, sequence: int, rows: list[dict[str, object]]) -> None:
    """One setting: this machine's figures and the paper's beside them."""
    paper = PAPER.get((batch, sequence)) or PAPER[(1, 128)]
    note = "" if (batch, sequence) in PAPER else " (its 1 x 128)"
    print(f"\nbatch {batch}, sequence {sequence}")
    header = f"{'':16} {'trained':>11} {'median ms':>10} {'ratio':>7}   {'95 % interval':18} {'verdict':24}"
    print(f"{header} paper{note}")
    for (label, kind, column), row in zip(ROWS, rows, strict=True):
        low, high = row["interval"]  # type: ignore[misc]
        trained = "" if kind == "base" else f"{adapter_parameters(config, 'lora' if kind == 'folded' else kind):,}"
        beside = "" if column is None else f"{paper[column]:g} ms ({100 * (paper[column] / paper[0] - 1):+.1f} %)"
        verdict = f"{row['verdict']} ({row['comparison']})"
        interval = f"[{low:.4f}, {high:.4f}]"
        measured = f"{row['median_ms']:>10.2f} {row['ratio']:>7.4f}   {interval:18} {verdict:24}"
        print(f"{label:16} {trained:>11} {measured} {beside}")


if __name__ == "__main__":
    main()
