"""PEFT's kinds beyond the LoRA family, as their files have them: ``peft_type`` to :class:`KindSpec`, literally."""

from __future__ import annotations

from loracc.kinds import peft_low_rank as low_rank
from loracc.kinds import peft_native as native
from loracc.kinds import peft_rare as rare
from loracc.kinds.peft_bridge import peanut, psoft
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
    "VBLORA": KindSpec(
        "VB-LoRA",
        {
            "vblora_logits_A": "A",
            "vblora_logits_B": "B",
            "vblora_logits_A_topk_indices": "A_indices",
            "vblora_logits_A_topk_weights": "A_weights",
            "vblora_logits_B_topk_indices": "B_indices",
            "vblora_logits_B_topk_weights": "B_weights",
        },
        low_rank.vblora,
        shared={"vblora_vector_bank": "bank"},
        config=("topk",),
        layers=("linear", "conv1d_hf"),
    ),
    "RANDLORA": KindSpec(
        "RandLoRA",
        # PEFT 0.21.2 also writes a copy of the shared bases for every layer.
        {"randlora_lambda": "lambda", "randlora_gamma": "gamma", "randlora_A": "A", "randlora_B": "B"},
        low_rank.randlora,
        shared={"randlora_A": "A", "randlora_B": "B"},
        config=("randlora_alpha",),
        layers=("linear", "conv1d_hf"),
    ),
    "PVERA": KindSpec(
        "PVeRA",
        {"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"},
        low_rank.pvera,
        shared={"pvera_A": "A", "pvera_B": "B"},
        config=("sample_at_inference",),
        layers=("linear", "conv1d_hf"),
    ),
    "DELORA": KindSpec(
        "DeLoRA",
        {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "w_norm"},
        low_rank.delora,
    ),
    "UNILORA": KindSpec(
        "UniLoRA",
        {f"unilora_{what}_{side}": f"{what}_{side}" for what in ("indices", "scales") for side in "AB"},
        low_rank.unilora,
        shared={"unilora_theta_d": "theta"},
        layers=("linear", "conv1d_hf"),
    ),
    "TINYLORA": KindSpec(
        "TinyLoRA",
        {"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P"},
        low_rank.tinylora,
        shared_prefixes={"tinylora_v.": "v."},
        layers=("linear", "conv1d_hf", "embedding"),
    ),
    "GRALORA": KindSpec(
        "GraLoRA",
        {
            "gralora_A": "A",
            "gralora_B": "B",
            "gralora_A_general.weight": "A_general",
            "gralora_B_general.weight": "B_general",
        },
        low_rank.gralora,
        config=("alpha", "r", "hybrid_r"),
        layers=("linear", "conv1d_hf"),
    ),
    "HIRA": KindSpec(
        "HiRA",
        {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "embedding_A", "hira_embedding_B": "embedding_B"},
        rare.hira,
        layers=("linear", "conv1d_hf", "conv1d", "conv2d", "conv3d", "embedding"),
    ),
    "GLORA": KindSpec(
        "GLoRA",
        {f"glora_{path}.{part}": f"{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")},
        rare.glora,
        optional=frozenset({"bias"}),
    ),
    "BEFT": KindSpec("BEFT", {"beft_bias": "bias"}, rare.beft),
    "LN_TUNING": KindSpec(
        "LN tuning",
        {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"},
        rare.ln_tuning,
        layers=("norm", "linear", "embedding", "conv2d"),
    ),
    "C3A": KindSpec("C3A", {"c3a_kernel": "kernel"}, rare.c3a),
    "ROAD": KindSpec(
        "RoAd",
        {"road_theta": "theta", "road_alpha": "alpha"},
        rare.road,
        optional=frozenset({"bias"}),
        config=("variant", "group_size"),
    ),
    "SHIRA": KindSpec("SHiRA", {"shira_weight": "weight", "shira_indices": "indices"}, rare.shira),
    "SUPERTUNING": KindSpec(
        "SuperTuning",
        {
            "supertuning_values": "values",
            "supertuning_indices": "indices",
            "supertuning_lora_A.weight": "lora_A",
            "supertuning_lora_B.weight": "lora_B",
        },
        rare.supertuning,
    ),
    "FOURIERFT": KindSpec(
        "FourierFT",
        {"fourierft_spectrum": "spectrum"},
        rare.fourierft,
        config=("scaling", "random_loc_seed"),
        layers=("linear", "conv1d_hf"),
        needs="torch",
    ),
    "WAVEFT": KindSpec(
        "WaveFT",
        {"waveft_spectrum": "waveft_spectrum"},
        rare.waveft,
        config=("scaling", "random_loc_seed", "use_idwt", "wavelet_family"),
        layers=("linear", "conv1d_hf"),
        needs="peft",
    ),
    "DEFT": KindSpec(
        "DEFT",
        {"deft_P": "P", "deft_R": "R"},
        rare.deft,
        config=("decomposition_method", "alpha", "para"),
        layers=("linear", "conv1d_hf"),
    ),
    "OSF": KindSpec("OSF", {f"osf_svd_params.{part}_low": part for part in "USV"}, rare.osf),
    "FROD": KindSpec(
        "FRoD",
        {"frod_lambda_l": "lambda", "frod_lambda_s_values": "values"},
        rare.frod,
        shared_prefixes={"frod_V.": "V.", "frod_s_indices.": "places.", "frod_s_size.": "size."},
        layers=("linear", "conv1d_hf"),
    ),
    "PSOFT": KindSpec(
        "PSOFT",
        {f"psoft_R.{part}": f"psoft_R.{part}" for part in ("weight", "vector_a", "vector_b")},
        psoft,
        config=("r", "psoft_alpha", "psoft_svd", "psoft_orth", "ab_svd_init", "use_cayley_neumann"),
        needs="peft",
    ),
    "PEANUT": KindSpec(
        "PEANuT",
        {
            "peanut_A.weight": "peanut_A.weight",
            "peanut_B.weight": "peanut_B.weight",
            **{
                f"peanut_{side}.{depth}.weight": f"peanut_{side}.{depth}.weight"
                for side in ("encoders", "decoders")
                for depth in range(16)
            },
        },
        peanut,
        config=("r", "depth", "scaling", "act_fn"),
        needs="peft",
    ),
}
