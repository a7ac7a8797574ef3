"""Kinds that PEFT itself evaluates, one bare layer at a time: too rare, or too tied to PEFT, to be written again here.

Their tensors keep PEFT's own names as roles. PEFT and torch are needed when the weight is folded, not before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.dtypes import Array
from loracc.errors import InputError, require
from loracc.kinds.base import SlabLocal
from loracc.kinds.spec import Config, pending

__all__ = ["PSOFT", "PEANuT", "PeftBridge", "WaveFTTransformed", "peanut", "psoft", "waveft_transformed"]

#: Settings of the training model that mean nothing for one bare layer.
_NEUTRAL: dict[str, object] = {
    "target_modules": ["layer"],
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "task_type": None,
    "base_model_name_or_path": None,
}


@dataclass(frozen=True, eq=False)
class PeftBridge(SlabLocal):
    """W' as PEFT's tuner merges it into a float64 ``torch.nn.Linear`` with the file's tensors and configuration.

    Attributes:
        tensors: By the tail of their key in the file.
        config: The adapter's configuration.
        module: For messages.
        target: The weight's shape, ``[out, in]``.
    """

    tiles: ClassVar[int] = -1
    peft_type: ClassVar[str]
    tensors: Mapping[str, Array]
    config: Config
    module: str
    target: tuple[int, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    def settings(self) -> dict[str, object]:
        """What else the configuration of the bare layer must say."""
        return {}

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        merged: Array = self._wrapped(w).merge_and_unload().layer.weight.detach().numpy()
        return merged.astype(w.dtype)

    def arrays(self) -> dict[str, Array]:
        return dict(self.tensors)

    def _wrapped(self, w: Array) -> Any:
        """The bare layer under PEFT, tensors loaded.

        Raises:
            MissingExtraError: PEFT is not installed.
            InputError: PEFT's layer of these settings has other tensors than the file.
        """
        peft = require("peft", f"fold a {self.kind} adapter")
        torch = require("torch", f"fold a {self.kind} adapter")
        holder = torch.nn.Module()
        holder.layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        weight = torch.from_numpy(np.ascontiguousarray(w, np.float64))
        # Built in float32, as where it was trained (PSOFT takes nothing wider), and evaluated in float64.
        holder.layer.weight.data = weight.float()
        model = peft.get_peft_model(holder, self._peft_config(peft)).double()
        model.base_model.model.layer.get_base_layer().weight.data = weight
        prefix = "base_model.model.layer."
        state = {prefix + tail: torch.from_numpy(array.astype(np.float64)) for tail, array in self.tensors.items()}
        expected = peft.get_peft_model_state_dict(model)
        shapes = {key: list(value.shape) for key, value in expected.items()}
        found = {key: list(value.shape) for key, value in state.items()}
        if shapes != found:
            raise InputError(f"{self.module}: PEFT's {self.kind} layer has the tensors {shapes}; the file has {found}.")
        peft.set_peft_model_state_dict(model, state)
        return model.eval()

    def _peft_config(self, peft: Any) -> Any:
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.peft_type)]
        fields = {field.name for field in dataclasses.fields(cls) if field.init}
        known = {name: value for name, value in self.config.items() if name in fields}
        known = {name: value for name, value in known.items() if name != "peft_type" and not name.endswith("_pattern")}
        neutral = {name: value for name, value in _NEUTRAL.items() if name in fields}
        return cls(**{**known, **neutral, **self.settings()})


class PSOFT(PeftBridge):
    """W' = W + s·B(R − I)A with A, B from W's singular vectors and R orthogonal up to two scalings (PEFT
    ``tuners/psoft``).

    The result depends on the signs that the singular value decomposition gives, as it does in PEFT.
    """

    kind: ClassVar[str] = "psoft"
    peft_type: ClassVar[str] = "PSOFT"


class PEANuT(PeftBridge):
    """W' = W + s·f(W), f a small network over W's columns (PEFT ``tuners/peanut``)."""

    kind: ClassVar[str] = "peanut"
    peft_type: ClassVar[str] = "PEANUT"


class WaveFTTransformed(PeftBridge):
    """ΔW is the inverse wavelet transform of a sparse spectrum (PEFT ``tuners/waveft`` with ``use_idwt``)."""

    kind: ClassVar[str] = "waveft"
    peft_type: ClassVar[str] = "WAVEFT"

    def settings(self) -> dict[str, object]:
        return {"n_frequency": int(self.tensors["waveft_spectrum"].size), "proportional_parameters": False}


def _bridged(cls: type[PeftBridge], arrays: Mapping[str, Array], config: Config, module: str) -> dict[str, Delta]:
    tensors = dict(arrays)
    return {"weight": pending(tensors, cls.kind, module, lambda shape: cls(tensors, config, module, shape))}


def psoft(arrays: Mapping[str, Array], config: Config, module: str) -> dict[str, Delta]:
    """A PSOFT layer, evaluated by PEFT."""
    return _bridged(PSOFT, arrays, config, module)


def peanut(arrays: Mapping[str, Array], config: Config, module: str) -> dict[str, Delta]:
    """A PEANuT layer, evaluated by PEFT."""
    return _bridged(PEANuT, arrays, config, module)


def waveft_transformed(arrays: Mapping[str, Array], config: Config, module: str) -> dict[str, Delta]:
    """A WaveFT layer with its wavelet transform, evaluated by PEFT."""
    return _bridged(WaveFTTransformed, arrays, config, module)
