"""kohya sd-scripts: ``lora_unet_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

sd-scripts' ``networks/lora.py`` and every tool around it write these (FORMATS.md 3). s = α/r with r of ``lora_down``; α
that is absent or 0 means s = 1. The names are looked up by mangling the base's (:mod:`loracc.passes.base_names`).
"""

from __future__ import annotations

from loracc.adapter import Adapter
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.network_modules import TAILS, is_network, read_network

__all__ = ["is_kohya", "read_kohya"]

#: What sd-scripts' own LoRA modules have.
_OWN = frozenset({"lora_up.weight", "lora_down.weight", "alpha"})


def is_kohya(source: AdapterSource) -> bool:
    """Whether the keys are those of sd-scripts' LoRA; LyCORIS' kinds are another format with the same names."""
    used = {next((tail for tail in TAILS if key.endswith(f".{tail}")), "") for key in source.tensors}
    return is_network(source) and "lora_up.weight" in used and used <= _OWN | {""}


def read_kohya(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read a kohya LoRA (see :func:`loracc.formats.network_modules.read_network`)."""
    return read_network(source, name, options, "kohya")
