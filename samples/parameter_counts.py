"""The trainable-parameter counts that the LoRA paper prints, beside what its own formula gives.

    python samples/parameter_counts.py

|Theta| = 2 x L x d x r (section 4.2): L weight matrices get a delta, each of d x d. Every row adapts q and v of every
layer, so L is twice the number of layers. The counts come from what ``loracc inspect --count --config`` does, on one
layer of those shapes and a PEFT configuration, and from the formula; the two are compared.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from loracc.counting import count_parameters


@dataclass(frozen=True)
class Row:
    """A model of the paper and the number that the paper prints for it."""

    model: str
    layers: int
    width: int
    rank: int
    printed: str
    where: str

    @property
    def formula(self) -> int:
        """2 x L x d x r, L = two matrices in each layer."""
        return 2 * (2 * self.layers) * self.width * self.rank


ROWS = (
    Row("RoBERTa base", 12, 768, 8, "0.3M", "table 2"),
    Row("RoBERTa large", 24, 1024, 8, "0.8M", "table 2"),
    Row("DeBERTa XXL", 48, 1536, 16, "4.7M", "table 2"),
    Row("GPT-2 M", 24, 1024, 4, "0.35M", "table 3"),
    Row("GPT-2 L", 36, 1280, 4, "0.77M", "table 3"),
    Row("GPT-3 175B", 96, 12288, 1, "4.7M", "table 4"),
    Row("GPT-3 175B", 96, 12288, 4, "18M", "table 5"),
    Row("GPT-3 175B", 96, 12288, 8, "37.7M", "table 4"),
)


def counted(row: Row) -> int:
    """The same by loracc, on one layer of that width, times the layers: all of GPT-3 would take 350 GB."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shapes = {f"layer.0.{name}.weight": (row.width, row.width) for name in ("query", "key", "value")}
        save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
        settings = {"peft_type": "LORA", "r": row.rank, "lora_alpha": 8, "target_modules": ["query", "value"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return row.layers * count_parameters(folder / "model.safetensors", folder / "adapter_config.json")["trainable"]


def main() -> int:
    wrong = 0
    print(f"{'model':14} {'r':>3} {'formula':>12} {'loracc':>12}   {'paper':7} {'':9}")
    for row in ROWS:
        count = counted(row)
        wrong += count != row.formula
        shown = float(row.printed[:-1]) * 1e6
        digits = len(row.printed[:-1].partition(".")[2])
        # A reader rounds or cuts; what neither gives is another number.
        agrees = abs(row.formula / 1e6 - shown / 1e6) < 10.0**-digits
        note = "" if agrees else f"text and formula disagree: {row.formula / 1e6:.{digits}f}M"
        print(f"{row.model:14} {row.rank:>3} {row.formula:>12,} {count:>12,}   {row.printed:7} {row.where:9} {note}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
