"""LyCORIS' and kohya's kinds as their files have them: which key tells a kind, and what its tensors are."""

from __future__ import annotations

from collections.abc import Collection

from loracc.kinds import lycoris_native as native
from loracc.kinds.spec import KindSpec

__all__ = ["LYCORIS_KINDS", "lycoris_kind"]

_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
_COMMON = {"alpha": "alpha", "dora_scale": "dora_scale"}
_CONVOLUTIONS = ("linear", "conv1d", "conv2d", "conv3d")

#: Keys of which any one tells the kind -> the kind, in the order they are asked. Tails stand behind the module's name.
LYCORIS_KINDS: dict[tuple[str, ...], KindSpec] = {
    ("lora_up.weight",): KindSpec(
        "LoCon",
        {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid", **_COMMON},
        native.locon,
        config=("dora_axis",),
        layers=_CONVOLUTIONS,
    ),
    ("hada_w1_a",): KindSpec(
        "LoHa",
        {**{f"hada_{role}": role for role in _LOHA}, **_COMMON},
        native.loha,
        config=("dora_axis",),
        layers=_CONVOLUTIONS,
    ),
    ("lokr_w1", "lokr_w1_a"): KindSpec(
        "LoKr",
        {**{f"lokr_{role}": role for role in _LOKR}, **_COMMON},
        native.lokr,
        config=("dora_axis",),
        layers=_CONVOLUTIONS,
    ),
    ("oft_blocks",): KindSpec(
        "OFT",
        {"oft_blocks": "oft_blocks", "rescale": "rescale", "alpha": "alpha"},
        native.oft,
        layers=_CONVOLUTIONS,
    ),
    ("a1.weight",): KindSpec(
        "GLoRA",
        {**{f"{role}.weight": role for role in ("a1", "a2", "b1", "b2")}, "alpha": "alpha"},
        native.glora,
        layers=_CONVOLUTIONS,
    ),
    ("on_input",): KindSpec("IA3", {"weight": "weight", "on_input": "on_input"}, native.ia3, layers=_CONVOLUTIONS),
    ("diff", "diff_b"): KindSpec(
        "full", {"diff": "diff", "diff_b": "diff_b"}, native.full, layers=(*_CONVOLUTIONS, "norm")
    ),
    ("w_norm", "b_norm"): KindSpec("norm", {"w_norm": "w_norm", "b_norm": "b_norm"}, native.norm, layers=("norm",)),
}


def lycoris_kind(tails: Collection[str]) -> KindSpec | None:
    """The kind that a module's keys belong to; None when no key tells."""
    return next((spec for marks, spec in LYCORIS_KINDS.items() if any(mark in tails for mark in marks)), None)
