"""The rows of the grid: PEFT configurations, with what tells their variants apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

TARGET: dict[str, Any] = {"target_modules": ["layer"]}

#: Row name -> a fresh configuration.
CASES: dict[str, Callable[[], Any]] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, lora_alpha=8, **TARGET),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=7, **TARGET),
    "LoHa Tucker": lambda: peft.LoHaConfig(r=4, alpha=7, use_effective_conv2d=True, **TARGET),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=7, **TARGET),
    "LoKr Tucker": lambda: peft.LoKrConfig(r=2, alpha=7, use_effective_conv2d=True, **TARGET),
    "LoKr both sides": lambda: peft.LoKrConfig(r=1, alpha=7, decompose_both=True, **TARGET),
    "LoKr full": lambda: peft.LoKrConfig(r=64, alpha=7, **TARGET),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **TARGET),
    "IA3 feedforward": lambda: peft.IA3Config(feedforward_modules=["layer"], **TARGET),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGET),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, **TARGET),
    "OFT Neumann 5": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TARGET),
    "OFT Neumann 3": lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=3, **TARGET),
    "OFT Neumann 2": lambda: peft.OFTConfig(r=4, oft_block_size=0, num_cayley_neumann_terms=2, **TARGET),
    "OFT constrained": lambda: peft.OFTConfig(r=0, oft_block_size=4, coft=True, eps=0.3, **TARGET),
    "OFT shared": lambda: peft.OFTConfig(r=0, oft_block_size=4, block_share=True, **TARGET),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **TARGET),
    "HRA": lambda: peft.HRAConfig(r=4, **TARGET),
    "HRA Gram-Schmidt": lambda: peft.HRAConfig(r=4, apply_GS=True, **TARGET),
    "MiSS": lambda: peft.MissConfig(r=3, **TARGET),
    "MiSS bat": lambda: peft.MissConfig(r=8, init_weights="bat", **TARGET),
    "MiSS mini": lambda: peft.MissConfig(r=3, mini_r=4, init_weights="mini", **TARGET),
}

#: (row, column) -> why there is no number, where PEFT builds the layer all the same.
GAPS: dict[tuple[str, str], str] = {
    ("AdaLoRA", "conv2d_groups"): "PEFT's own forward fails",
    **{
        (row, column): "refused: PEFT's forward is no kernel"
        for row in CASES
        if row.startswith("OFT")
        for column in ("conv2d", "conv2d_groups")
    },
}
