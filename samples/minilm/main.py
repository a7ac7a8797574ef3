"""Fold a real adapter into the real all-MiniLM-L6-v2, and show that the ONNX file retrieves as well as PEFT does.

1. `loracc fold` writes the ONNX file and prints its verification.
2. One retrieval score is computed for the base and for base + adapter in PyTorch, and for the file in ONNX Runtime.
3. Exit 1 unless the file scores what PEFT scores, to four digits, and more than the base.

    python -m samples.minilm.main [--out FILE.onnx]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from samples.minilm.dataset import Pair, held_out_pairs
from samples.minilm.weights import MODEL_ID, minilm_folder

if TYPE_CHECKING:
    from samples.minilm.evaluate import Encoder

ADAPTER = Path(__file__).with_name("adapter")
OUT = Path("build", "minilm-docstrings.onnx")
# Half a unit of the fourth digit. One query that falls from rank 1 to rank 2 already costs 0.0009.
AGREEMENT = 5e-5


def fold(folder: Path, out: Path) -> None:
    """Run the command line as a user would, its output on this terminal."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "loracc", "fold", str(folder), str(ADAPTER), "-o", str(out), "--force"]
    print("$ loracc", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def scores(folder: Path, onnx_file: Path, pairs: list[Pair]) -> tuple[float, float, float]:
    """MRR of the base, of PEFT unmerged and of the folded file; a line each as they come."""
    from samples.minilm.encoders import load_base, load_peft, load_tokenizer, onnx_encoder, torch_encoder
    from samples.minilm.evaluate import mrr

    tokenizer = load_tokenizer(folder)

    def score(label: str, runtime: str, load: Callable[[], Encoder]) -> float:
        start = time.monotonic()
        value = mrr(load(), tokenizer, pairs)
        print(f"{label:<24}{runtime:<16}{value:.4f}{time.monotonic() - start:>8.1f} s", flush=True)
        return value

    print(f"\n{'':<24}{'runs in':<16}{'MRR':<6}{'took':>10}")
    return (
        score("base", "PyTorch", lambda: torch_encoder(load_base(folder))),
        score("base + adapter (PEFT)", "PyTorch", lambda: torch_encoder(load_peft(folder, ADAPTER))),
        score("folded", "ONNX Runtime", lambda: onnx_encoder(onnx_file)),
    )


def verdict(base: float, peft: float, folded: float) -> str | None:
    """What is wrong with the scores, or None.

    >>> verdict(0.5, 0.61234, 0.61236)
    >>> verdict(0.5, 0.6123, 0.6125)
    'the folded file scores 0.6125, PEFT 0.6123: they differ by 0.00020'
    >>> verdict(0.5, 0.5, 0.5)
    'the folded file scores 0.5000, no better than the base with 0.5000'
    """
    if abs(folded - peft) > AGREEMENT:
        return f"the folded file scores {folded:.4f}, PEFT {peft:.4f}: they differ by {abs(folded - peft):.5f}"
    if folded <= base:
        return f"the folded file scores {folded:.4f}, no better than the base with {base:.4f}"
    return None


def main() -> int:
    """Fold, score, compare; the exit code."""
    parser = argparse.ArgumentParser(description="Fold the sample adapter into all-MiniLM-L6-v2 and score the result.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the ONNX file to write (default: {OUT.as_posix()})")
    out: Path = parser.parse_args().out
    # Everything is on this machine: no library shall look for a newer model elsewhere.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    folder, pairs = minilm_folder(), held_out_pairs()
    fold(folder, out)
    modules = len({pair.module for pair in pairs})
    print(f"\n{MODEL_ID}: docstring → name, {len(pairs)} queries from {modules} modules the adapter never saw")
    base, peft, folded = scores(folder, out, pairs)
    problem = verdict(base, peft, folded)
    if problem:
        print(f"FAILED: {problem}", file=sys.stderr)
        return 1
    print(f"\nfolded = PEFT to 4 digits, and {folded - base:+.4f} over the base: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
