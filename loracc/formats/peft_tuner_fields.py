"""``adapter_config.json`` of PEFT's kinds beyond LoRA: which fields a fold knows.

Fields and defaults are PEFT 0.21.2's. What changes the result without being in the tensors stands in each kind's
``KindSpec.config``; here stand the others: training, initialisation, and shapes that the tensors have themselves. A
field in none of the tables came with a later PEFT, and is refused when it is set, since it may change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracc.errors import InputError, UnsupportedError
from loracc.formats.peft_config import HARMLESS, PeftConfig
from loracc.formats.peft_fields import optional_list, switch
from loracc.formats.tensors import some
from loracc.kinds.spec import KindSpec

__all__ = ["parse_tuner_config"]

#: Of every kind.
_COMMON = frozenset({"r", "init_weights", "fan_in_fan_out", "bias", "modules_to_save", "module_dropout"})
#: Of one kind: what its tensors already show.
_SHOWN: dict[str, str] = {
    "ADALORA": "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step init_lora_weights rank_pattern",
    "LOHA": "rank_dropout use_effective_conv2d",
    "LOKR": "rank_dropout use_effective_conv2d decompose_both decompose_factor rank_dropout_scale",
    "IA3": "init_ia3_weights",
    "VERA": "projection_prng_key save_projection vera_dropout d_initial",
    "OFT": "oft_block_size",
    "BOFT": "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout",
    "MISS": "miss_dropout mini_r",
    "VBLORA": "num_vectors vector_length save_only_topk_weights vblora_dropout init_vector_bank_bound init_logits_std",
    "RANDLORA": "projection_prng_key save_projection sparse very_sparse randlora_dropout",
    "PVERA": "projection_prng_key save_projection pvera_dropout d_initial generator_seed",
    "DELORA": "delora_lambda rank_pattern lambda_pattern",
    "UNILORA": "proj_seed theta_d_length unilora_dropout init_theta_d_bound save_indices",
    "TINYLORA": "u weight_tying projection_seed save_projection init_v_bound tinylora_dropout",
    "GRALORA": "gralora_dropout gralora_k",
    "HIRA": "hira_dropout rank_pattern",
    "GLORA": "config_A_B config_C config_D_E",
    "C3A": "block_size block_size_pattern",
    "SHIRA": "mask_type random_seed",
    "SUPERTUNING": "sparsity select_top lora_alpha save_precomputed_indices",
    "FOURIERFT": "n_frequency n_frequency_pattern",
    "WAVEFT": "n_frequency n_frequency_pattern proportional_parameters",
    "DEFT": "init_scale deft_dropout",
    "OSF": "effective_rank rank_pattern target_svd_config",
    "FROD": "projection_prng_key save_projection frod_dropout sparse_rate regularization_alpha progressbar "
    "runtime_offload_base_weight",
    "PSOFT": "psoft_dropout psoft_svd_lowrank_niter random_seed psoft_mag_b psoft_mag_a num_cayley_neumann_terms "
    "cayley_neumann_eps",
    "TRAINABLE_TOKENS": "token_indices",
}


def parse_tuner_config(path: Path, kind: str, spec: KindSpec, config: Mapping[str, Any]) -> PeftConfig:
    """Check the configuration of a kind and keep what all kinds have in common; the rest is for ``spec.build``.

    Args:
        path: For messages.
        kind: The ``peft_type``.
        spec: Its line of the table.
        config: The JSON object.

    Raises:
        InputError: A field has a value that PEFT could not have written.
        UnsupportedError: A field is set that loracc does not know.
    """
    known = HARMLESS | _COMMON | set(spec.config) | set(_SHOWN.get(kind, "").split())
    unknown = [f"{key}={value!r:.60}" for key, value in config.items() if key not in known and value]
    if unknown:
        raise UnsupportedError(
            f"{path}: adapter_config.json of a {spec.name} adapter sets fields that loracc does not know and that may "
            f"change the result: {some(unknown)}.",
            hint="If they do not (training settings), remove them from the file.",
        )
    bias = config.get("bias") or "none"
    if not isinstance(bias, str) or not (bias in ("none", "all") or bias.endswith("_only")):
        raise InputError(f"{path}: bias is {bias!r}, expected 'none', 'all' or '{kind.lower()}_only'.")
    return PeftConfig(
        r=1,
        alpha=1.0,
        fan_in_fan_out=switch(path, config, "fan_in_fan_out"),
        bias="lora_only" if bias.endswith("_only") else bias,
        modules_to_save=optional_list(path, config, "modules_to_save"),
    )
