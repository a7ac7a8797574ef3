"""PEFT kinds that cannot be folded, and why: no weight can hold what they do, or the file does not hold it."""

from __future__ import annotations

__all__ = ["NOT_FOLDABLE"]

_RUNTIME = "it does not change the model's weights but what goes into or through them at run time"
_ROUTED = "it weighs its experts by the input, and a folded weight is the same for every input"

#: Kinds of PEFT that no weight can hold: ``peft_type`` to (name, why).
NOT_FOLDABLE: dict[str, tuple[str, str]] = {
    **{
        kind: (name, _RUNTIME)
        for kind, name in (
            ("PROMPT_TUNING", "prompt tuning"),
            ("MULTITASK_PROMPT_TUNING", "multitask prompt tuning"),
            ("P_TUNING", "p-tuning"),
            ("PREFIX_TUNING", "prefix tuning"),
            ("ADAPTION_PROMPT", "adaption prompt"),
            ("CPT", "context-aware prompt tuning"),
            ("CARTRIDGE", "Cartridge"),
        )
    },
    "XLORA": ("X-LoRA", _ROUTED),
    "POLY": ("Poly", _ROUTED),
    "LILY": ("Lily", _ROUTED),
    "SHADOW": ("Shadow", "a second network runs beside the model and corrects its hidden states"),
    "ADAMSS": (
        "AdaMSS",
        "which rows belong to which of its subspaces comes from a clustering of the base weights that the file does "
        "not hold",
    ),
}
