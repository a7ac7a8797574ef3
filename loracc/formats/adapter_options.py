"""What a reader of adapters may need to be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loracc.errors import InputError

__all__ = ["AdapterOptions"]


@dataclass(frozen=True)
class AdapterOptions:
    """The user's answers to what a file does not say.

    Attributes:
        alpha: ``lora_alpha`` for a file that does not say its own.
        scale: The whole factor on B·A, in place of alpha/r, for such a file.
        allow_pickle: A ``.bin`` or ``.pt`` that holds more than tensors may run code.
        residual_base: The model is the residual base that a PiSSA-family adapter was trained on.
        describe: Only to be looked at: a missing scale is taken as 1.
        dora_axis: "out" or "in": which axis a one-dimensional magnitude of a square weight belongs to.
        moe_layout: "peft" or "unsloth": how the experts' B factors are packed in one tensor.
        component: Which model of a pipeline is meant ("unet", "text_encoder", ...), where a file adapts several.
        enable_lora: loralib's ``MergedLinear``: which of its equal parts of the outputs are adapted.
        heads: (attention heads, key-value heads) of the base, for a GGUF file whose query and key rows are reordered.

    Raises:
        InputError: A number is not finite or zero, or both are given; an answer is none of those that exist.
    """

    alpha: float | None = None
    scale: float | None = None
    allow_pickle: bool = False
    residual_base: bool = False
    describe: bool = False
    dora_axis: str | None = None
    moe_layout: str | None = None
    component: str | None = None
    enable_lora: tuple[bool, ...] | None = None
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            raise InputError("both --alpha and --scale are given: --scale is the whole factor, alpha/r included.")
        for flag, value in (("--alpha", self.alpha), ("--scale", self.scale)):
            if value is not None and (not math.isfinite(value) or value == 0.0):
                raise InputError(f"{flag} {value}: expected a finite number other than 0.")
        for flag, answer, answers in (
            ("--dora-axis", self.dora_axis, ("out", "in")),
            ("--moe-layout", self.moe_layout, ("peft", "unsloth")),
        ):
            if answer is not None and answer not in answers:
                raise InputError(f"{flag} {answer}: expected {' or '.join(answers)}.")
        if self.enable_lora is not None and not any(self.enable_lora):
            raise InputError("--enable-lora switches every part off, and then nothing is adapted.")
        if self.heads is not None and (min(self.heads) < 1 or self.heads[0] % self.heads[1]):
            raise InputError(f"--gguf-heads {self.heads[0]},{self.heads[1]}: expected heads and a divisor of them.")

    def facts(self) -> dict[str, object]:
        """What of it decides the result, for digests."""
        names = ("alpha", "scale", "dora_axis", "moe_layout", "component", "enable_lora", "heads")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
