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

    Raises:
        InputError: A number is not finite or zero, or both are given.
    """

    alpha: float | None = None
    scale: float | None = None
    allow_pickle: bool = False
    residual_base: bool = False
    describe: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            raise InputError("both --alpha and --scale are given: --scale is the whole factor, alpha/r included.")
        for flag, value in (("--alpha", self.alpha), ("--scale", self.scale)):
            if value is not None and (not math.isfinite(value) or value == 0.0):
                raise InputError(f"{flag} {value}: expected a finite number other than 0.")
