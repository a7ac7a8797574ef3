"""diffusers: ``pytorch_lora_weights.safetensors``, with the pipeline's model in front of every key.

Inside it is PEFT's LoRA, under PEFT's names or those of four older generations of diffusers (``_RULES``). The scale is
in the file's metadata (``lora_adapter_metadata``: PEFT configurations by model), or in ``.alpha`` tensors; with
neither, diffusers takes alpha = rank for each module, and so does loracc, with a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter, Entry
from loracc.errors import InputError, LoraccError, combined
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.components import choose_component
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.peft_config import PeftConfig, parse_lora_config
from loracc.formats.peft_kinds import KINDS, Context
from loracc.formats.tensors import check_tensors, digest_of

__all__ = ["is_diffusers", "read_diffusers"]

METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(
    r"^(unet|unet_2|transformer|transformer_2|text_encoder|text_encoder_2|text_encoder_3|prior|diffusion_model)\.(?=.)"
)
_RULES = (
    KeyRule("A", re.compile(r"\.lora_A(\.(?!weight$)(?P<name>[^.]+))?\.weight$")),
    KeyRule("B", re.compile(r"\.lora_B(\.(?!weight$)(?P<name>[^.]+))?\.weight$")),
    KeyRule("B_bias", re.compile(r"\.lora_B(\.(?!bias$)(?P<name>[^.]+))?\.bias$")),
    KeyRule("A", re.compile(r"\.(lora|lora_linear_layer)\.down\.weight$")),
    KeyRule("B", re.compile(r"\.(lora|lora_linear_layer)\.up\.weight$")),
    KeyRule("magnitude", re.compile(r"\.lora_magnitude_vector(\.(?!weight$)(?P<name>[^.]+))?(\.weight)?$")),
    KeyRule("alpha", re.compile(r"\.alpha$")),
)
#: Generations before PEFT's names: one of these tails tells the format.
_OLD_TAIL = re.compile(
    r"(\.lora|\.lora_linear_layer|\.processor\.\w+_lora|\.self_attn\.to_\w+_lora)\.(up|down)\.weight$"
)
_NEW_TAIL = re.compile(r"\.lora_[AB](\.[^.]+)?\.weight$")
#: Attention processors had their projections' factors beside them: pattern -> the projection's own path.
_PROCESSORS: tuple[tuple[re.Pattern[str], Mapping[str, str]], ...] = (
    (
        re.compile(r"\.processor\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(up|down)\.weight$"),
        {"to_out": "to_out.0"},
    ),
    (
        re.compile(r"(?<=\.self_attn)\.(to_q|to_k|to_v|to_out)_lora\.(up|down)\.weight$"),
        {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
    ),
)
#: ``transformer.`` also begins the module paths of GPT-2 and others; behind it these are diffusers' own.
_BLOCKS = re.compile(r"^transformer(_2)?\.(transformer_blocks|single_transformer_blocks)\.")


def is_diffusers(source: AdapterSource) -> bool:
    """Whether diffusers wrote it: its metadata, its older names, or a pipeline's model before every key."""
    if source.config is not None:
        return False
    keys = list(source.tensors)
    if METADATA in source.metadata or any(_OLD_TAIL.search(key) for key in keys):
        return True
    factors = [key for key in keys if _NEW_TAIL.search(key)]
    told = [key for key in factors if _COMPONENT.match(key) and not key.startswith("transformer")]
    return bool(factors) and len(told) + sum(bool(_BLOCKS.match(key)) for key in factors) == len(factors)


def read_diffusers(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read a diffusers LoRA file; every key is used once.

    Raises:
        InputError: Keys, tensors or metadata do not make an adapter; the file is for several models of a pipeline and
            nobody said which.
        UnsupportedError: The metadata says a kind that cannot be folded.
        NumericsError: A tensor holds inf or NaN.
    """
    path = source.file
    check_tensors(path, source.tensors)
    names = {_modern(key): key for key in source.tensors}
    if len(names) != len(source.tensors):
        raise InputError(f"{path}: two generations of names for one tensor.", hint="Save the adapter again.")
    grouped = group(path, {new: source.tensors[key] for new, key in names.items()}, _RULES)
    if grouped.rest:
        raise unknown_keys(path, "diffusers", (names[key] for key in grouped.rest))
    modules = {
        module: {role: Keyed(names[tensor.key], tensor.array) for role, tensor in roles.items()}
        for module, roles in grouped.modules.items()
    }
    split = {module: _split(module) for module in modules}
    chosen = choose_component(path, [component for component, _ in split.values()], options)
    configs = _configs(path, source.metadata, options)
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    for module, roles in modules.items():
        component, rest = split[module]
        if chosen.keep(component):
            try:
                entries += _entries(rest, roles, configs.get(component), options, path, chosen.prefix(component))
            except LoraccError as error:
                errors.append(error)
    if errors:
        raise combined(errors)
    silent = sum(
        "alpha" not in roles and split[module][0] not in configs and chosen.keep(split[module][0])
        for module, roles in modules.items()
    )
    notes = [f"{silent} modules do not say alpha: it is taken to be their rank, as diffusers does (the scale is 1)."]
    return Adapter(
        name=name,
        path=str(source.path),
        format="diffusers",
        entries=tuple(entries),
        notes=(*chosen.notes, *(notes if silent and not _told(options) else ())),
        config={component: vars(config) for component, config in configs.items()},
        digested=digest_of(source.tensors, {**options.facts(), METADATA: source.metadata.get(METADATA, "")}),
    )


def _told(options: AdapterOptions) -> bool:
    return options.alpha is not None or options.scale is not None


def _modern(key: str) -> str:
    """An attention processor's key as its projection's own.

    >>> _modern("unet.mid.attn1.processor.to_out_lora.down.weight")
    'unet.mid.attn1.to_out.0.lora.down.weight'
    """
    for pattern, renamed in _PROCESSORS:
        match = pattern.search(key)
        if match:
            return f"{key[: match.start()]}.{renamed.get(match[1], match[1])}.lora.{match[2]}.weight"
    return key


def _split(module: str) -> tuple[str, str]:
    """(model of the pipeline, module path in it)."""
    match = _COMPONENT.match(module)
    return (match[1], module[match.end() :]) if match else ("", module)


def _configs(path: Path, metadata: Mapping[str, str], options: AdapterOptions) -> dict[str, PeftConfig]:
    """The PEFT configuration of each model, from ``{"unet.r": 4, "text_encoder.r": 8, ...}``."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        flat: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: {METADATA} in its metadata is not JSON ({error}).") from error
    if not isinstance(flat, dict):
        raise InputError(f"{path}: {METADATA} in its metadata is not an object.")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {"peft_type": "LORA"})[field] = value
    return {
        component: parse_lora_config(path, config, residual_base=options.residual_base)
        for component, config in configs.items()
    }


def _entries(
    module: str, roles: Mapping[str, Keyed], config: PeftConfig | None, options: AdapterOptions, path: Path, prefix: str
) -> list[Entry]:
    factors = {role: tensor for role, tensor in roles.items() if role != "alpha"}
    kind = next((kind for kind in KINDS if kind.fits(factors)), None)
    if kind is None:
        keys = ", ".join(tensor.key for tensor in roles.values())
        raise InputError(f"{path}: {module}: {keys} are not a whole LoRA layer: its factors come in pairs.")
    rank = factors["A"].array.shape[0] if factors["A"].array.ndim else 0
    if config is None or "alpha" in roles:
        config = PeftConfig(r=rank, alpha=_alpha(roles, rank, options, path), dora="magnitude" in roles)
    built = kind.build(module, factors, Context(path, config, options))
    alpha_keys = (roles["alpha"].key,) if "alpha" in roles else ()
    first = replace(built[0], keys=(*built[0].keys, *alpha_keys), fan_in_fan_out=None)
    return [replace(entry, module=prefix + entry.module) for entry in (first, *built[1:])]


def _alpha(roles: Mapping[str, Keyed], rank: int, options: AdapterOptions, path: Path) -> float:
    if "alpha" in roles:
        tensor = roles["alpha"]
        if tensor.array.size != 1 or not tensor.array.any():
            raise InputError(
                f"{path}: {tensor.key} is {tensor.array.tolist()!r:.60}, expected one number other than 0."
            )
        return float(tensor.array.reshape(()))
    if options.scale is not None:
        return options.scale * rank
    return options.alpha if options.alpha is not None else float(rank)
