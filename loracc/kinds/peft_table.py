"""PEFT's kinds beyond the LoRA family, as their files have them: ``peft_type`` to :class:`KindSpec`, literally."""

from __future__ import annotations

from loracc.kinds import peft_native as native
from loracc.kinds.spec import KindSpec

__all__ = ["PEFT_KINDS"]

_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

PEFT_KINDS: dict[str, KindSpec] = {
    "ADALORA": KindSpec(
        "AdaLoRA",
        {"lora_A": "A", "lora_B": "B", "lora_E": "E", "ranknum": "ranknum"},
        native.adalora,
        config=("lora_alpha", "init_r"),
        layers=("linear", "conv1d_hf", "conv2d"),
    ),
    "LOHA": KindSpec(
        "LoHa",
        {f"hada_{role}": role for role in _LOHA},
        native.loha,
        config=("r", "alpha", "rank_pattern", "alpha_pattern"),
        layers=("linear", "conv1d", "conv2d"),
    ),
    "LOKR": KindSpec(
        "LoKr",
        {f"lokr_{role}": role for role in _LOKR},
        native.lokr,
        config=("r", "alpha", "rank_pattern", "alpha_pattern"),
        layers=("linear", "conv1d", "conv2d"),
    ),
    "IA3": KindSpec(
        "IA3",
        {"ia3_l": "l"},
        native.ia3,
        optional=frozenset({"bias"}),
        config=("feedforward_modules",),
        layers=("linear", "conv1d_hf", "conv2d", "conv3d"),
    ),
    "VERA": KindSpec(
        "VeRA",
        {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
        native.vera,
        shared={"vera_A": "A", "vera_B": "B"},
        layers=("linear", "conv1d_hf"),
    ),
    "OFT": KindSpec(
        "OFT",
        {"oft_R.weight": "R", "oft_embedding_R.weight": "embedding_R"},
        native.oft,
        config=("coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share"),
        layers=("linear", "conv2d", "embedding"),
    ),
    "BOFT": KindSpec("BOFT", {"boft_R": "R", "boft_s": "s"}, native.boft, layers=("linear", "conv2d")),
    "HRA": KindSpec("HRA", {"hra_u": "u"}, native.hra, config=("apply_GS",), layers=("linear", "conv2d")),
    "MISS": KindSpec("MiSS", {"miss_block": "block"}, native.miss, config=("init_weights",)),
}
