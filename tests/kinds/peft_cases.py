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
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=16, topk=3, **TARGET),
    "VB-LoRA top-k": lambda: peft.VBLoRAConfig(
        r=4, vector_length=4, num_vectors=16, topk=3, save_only_topk_weights=True, **TARGET
    ),
    "RandLoRA": lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, **TARGET),
    "PVeRA": lambda: peft.PveraConfig(r=4, **TARGET),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, **TARGET),
    "UniLoRA": lambda: peft.UniLoraConfig(r=4, save_indices=True, **TARGET),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=3, **TARGET),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, alpha=7, gralora_k=2, **TARGET),
    "GraLoRA hybrid": lambda: peft.GraloraConfig(r=4, hybrid_r=2, alpha=7, gralora_k=2, **TARGET),
    "HiRA": lambda: peft.HiraConfig(r=4, **TARGET),
    "GLoRA": lambda: peft.GloraConfig(r=4, config_C="none", **TARGET),
    "GLoRA vector": lambda: peft.GloraConfig(r=4, config_A_B="vector", config_C="none", config_D_E="vector", **TARGET),
    "BEFT": lambda: peft.BeftConfig(**TARGET),
    "LN tuning": lambda: peft.LNTuningConfig(**TARGET),
    "C3A": lambda: peft.C3AConfig(block_size=4, **TARGET),
    "RoAd 1": lambda: peft.RoadConfig(variant="road_1", group_size=8, **TARGET),
    "RoAd 2": lambda: peft.RoadConfig(variant="road_2", group_size=8, **TARGET),
    "RoAd 4": lambda: peft.RoadConfig(variant="road_4", group_size=8, **TARGET),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **TARGET),
    "SuperTuning": lambda: peft.SupertuningConfig(sparsity=0.8, **TARGET),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=30, **TARGET),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=30, use_idwt=False, **TARGET),
    "WaveFT wavelets": lambda: peft.WaveFTConfig(n_frequency=30, **TARGET),
    "DEFT": lambda: peft.DeftConfig(r=4, **TARGET),
    "DEFT qr": lambda: peft.DeftConfig(r=4, decomposition_method="qr", alpha=6, **TARGET),
    "DEFT PaRa": lambda: peft.DeftConfig(r=4, para=True, **TARGET),
    "OSF": lambda: peft.OSFConfig(effective_rank=6, **TARGET),
    "FRoD": lambda: peft.FrodConfig(**TARGET),
    "PSOFT": lambda: peft.PsoftConfig(r=4, **TARGET),
    "PEANuT": lambda: peft.PeanutConfig(r=4, depth=2, **TARGET),
}

#: (row, column) -> why there is no number, where PEFT builds the layer all the same.
GAPS: dict[tuple[str, str], str] = {
    ("AdaLoRA", "conv2d_groups"): "PEFT fails",  # its own forward
    ("BEFT", "linear_square"): "no bias",  # the layer has none to change
    **{
        (row, column): "refused"  # PEFT's forward is no kernel
        for row in CASES
        if row.startswith("OFT")
        for column in ("conv2d", "conv2d_groups")
    },
}

#: Rows that PEFT computes in float32 whatever the parameters' dtype, and where.
LOOSE: dict[str, float] = {
    "C3A": 2e-6,  # BlockCircularConvolution casts to float32
    "FourierFT": 1e-6,  # get_delta_weight: spectrum.float()
    "DEFT": 2e-6,  # _project and forward cast to float32
    "DEFT qr": 2e-6,
    "DEFT PaRa": 2e-6,
    "OSF": 5e-6,  # decompose_weight_matrix casts to float32
    "FRoD": 2e-7,  # U is rounded to float32
}
