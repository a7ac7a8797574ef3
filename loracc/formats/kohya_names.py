"""kohya's module names: a prefix that tells the model, and the module path with underscores for dots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loracc.errors import InputError

__all__ = ["NAMES_KEY", "PREFIXES", "dotted_names", "mangle", "split_component"]

#: Where loracc's own files keep {name in the file: module path} (safetensors metadata, JSON).
NAMES_KEY = "loracc.module_names"

#: What a name begins with -> the model of the pipeline; the first that fits. With dots: files of ComfyUI and others
#: that keep module paths as they are.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "unet"),
    ("lora_prior_unet_", "prior"),
    ("lora_transformer_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lycoris_", ""),
    ("diffusion_model.", "diffusion_model"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
)


def mangle(module: str) -> str:
    """A module path as the file has it, without the prefix.

    >>> mangle("encoder.layer.0.self_attn")
    'encoder_layer_0_self_attn'
    """
    return module.replace(".", "_")


def split_component(name: str) -> tuple[str, str]:
    """(component, the rest of the name).

    >>> split_component("lora_te1_text_model_encoder_layers_0_mlp_fc1"), split_component("fc")
    (('text_encoder', 'text_model_encoder_layers_0_mlp_fc1'), ('', 'fc'))
    """
    for prefix, component in PREFIXES:
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return "", name


def dotted_names(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """{name in the file: module path} as loracc's writer left it; empty for files of other tools.

    Raises:
        InputError: The record is malformed, or a path in it is not spelled as the name it stands for.
    """
    text = metadata.get(NAMES_KEY)
    if text is None:
        return {}
    try:
        names = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: {NAMES_KEY} in its metadata is not JSON ({error}).") from error
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise InputError(f"{path}: {NAMES_KEY} in its metadata is not an object of strings.")
    for name, module in names.items():
        if split_component(name)[1] != mangle(module):
            raise InputError(f"{path}: {NAMES_KEY} in its metadata: {name!r} cannot be {module!r}.")
    return names
