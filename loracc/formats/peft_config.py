"""PEFT's ``adapter_config.json`` for LoRA: what decides the folded result, what does not, and what is refused.

Fields and defaults are PEFT 0.21.2's ``LoraConfig``. Three tables say what each field is to a fold; a field in none of
them came with a later PEFT, and is refused when it is set, since it may change the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.errors import InputError, UnsupportedError
from loracc.formats.peft_fields import (
    integer,
    mapping,
    names_or_pattern,
    number,
    optional_list,
    switch,
    token_indices,
)
from loracc.formats.peft_refused import NOT_FOLDABLE
from loracc.formats.tensors import some

__all__ = ["HARMLESS", "BlockDiagonal", "PeftConfig", "check_peft_type", "parse_lora_config", "pattern_value"]

#: Training, provenance and selection: the tensors already are what came out of these.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "peft_version",
        "peft_type",
        "inference_mode",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "modules_to_tie",
        "target_modules_to_tie",
        "merge_weights",
    }
)
#: What a fold reads.
_RESULT = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "init_lora_weights",
        "use_bdlora",
        "kasa_config",
    }
)
#: Set, these make an adapter that is refused: (field, its name, why).
_REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        "alora_invocation_tokens",
        "aLoRA",
        "it acts only on the tokens after its invocation string, and a weight has none",
    ),
    ("arrow_config", "Arrow", "it routes each token to other experts, and a folded weight is the same for all"),
    ("layer_replication", "layer_replication", "it adds layers to the model, and a fold changes weights only"),
    ("monteclora_config", "MonteCLoRA", "it samples its weights, and a folded weight is one value"),
    ("use_qalora", "QALoRA", "its A acts on pooled inputs; not supported yet"),
)
#: Initialisations that leave the base weight as it was.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
#: Initialisations that take a part of the base weight into A and B, or quantise it.
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class BlockDiagonal:
    """``use_bdlora``: a module is meant by a piece of its path, as in PEFT (``pattern in target_name``)."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int

    def side(self, module: str) -> str | None:
        """Which factor of a module is block-diagonal: "A", "B" or None."""
        if any(piece in module for piece in self.a):
            return "A"
        return "B" if any(piece in module for piece in self.b) else None


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a LoRA configuration that decide the folded result.

    Attributes:
        peft_version: Who wrote it, as (major, minor); None when it does not say (before 0.18).
        tokens: ``trainable_token_indices``: by module name, "" for "the input embedding".
        target_modules: Names or one regular expression, kept only beside ``target_parameters``, to tell LoRA on a
            module from LoRA on one of its raw parameters.
        blocks: BD-LoRA: which modules' factors are stored as blocks of a diagonal.
        kasa: KaSA: a diagonal stands between the factors, and W loses its r smallest singular values.
    """

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    tokens: Mapping[str, tuple[int, ...]] | None = None
    peft_version: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    blocks: BlockDiagonal | None = None
    kasa: bool = False

    def adapts_module(self, path: str) -> bool:
        """Whether ``target_modules`` means this module (PEFT's ``check_target_module_exists``).

        >>> config = PeftConfig(8, 8, target_modules=("q", "lm_head"))
        >>> config.adapts_module("layers.0.q"), config.adapts_module("lm_head"), config.adapts_module("experts")
        (True, True, False)
        """
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in self.target_modules)

    def rank_of(self, path: str) -> int:
        """r of a module (or of ``module.parameter`` for a targeted parameter)."""
        return int(pattern_value(self.rank_pattern or {}, path, self.r))

    def alpha_of(self, path: str) -> float:
        """lora_alpha of a module."""
        return float(pattern_value(self.alpha_pattern or {}, path, self.alpha))


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's lookup (``get_pattern_key``): the first pattern that matches ``(.*\\.)?(KEY)$`` wins.

    >>> pattern_value({"layers.0.q": 2, "q": 3}, "model.layers.0.q", 8), pattern_value({"q": 3}, "model.qq", 8)
    (2, 8)
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def check_peft_type(path: Path, config: Mapping[str, Any]) -> str:
    """The ``peft_type``; what cannot be folded is refused by name.

    Raises:
        InputError: It is another library's file.
        UnsupportedError: A PEFT method that no weight can hold.
    """
    if "lora_parameters" in config:
        raise UnsupportedError(
            f"{path}: adapter_config.json is mlx-lm's (it has lora_parameters), not PEFT's; MLX adapters are not "
            "supported yet."
        )
    kind = config.get("peft_type")
    if kind is None:
        raise InputError(
            f"{path}: adapter_config.json has no peft_type: it is not PEFT's.",
            hint="Give the tensor file by itself, with --alpha or --scale.",
        )
    name = str(kind).upper().rpartition(".")[2]
    if name in NOT_FOLDABLE:
        called, why = NOT_FOLDABLE[name]
        raise UnsupportedError(f"{path}: a {called} adapter (peft_type {name}) cannot be folded: {why}.")
    return name


def parse_lora_config(path: Path, config: Mapping[str, Any], *, residual_base: bool = False) -> PeftConfig:
    """Check a LoRA configuration and keep what decides the result.

    Args:
        path: For messages.
        config: The JSON object.
        residual_base: The user says that the model is the residual base of a PiSSA-family adapter.

    Raises:
        InputError: A field has a value that PEFT could not have written.
        UnsupportedError: A field makes it an adapter that cannot be folded, or is not known.
    """
    _refuse(path, config)
    _check_init(path, config.get("init_lora_weights", True), residual_base)
    parameters = optional_list(path, config, "target_parameters")
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: bias is {bias!r}, expected 'none', 'all' or 'lora_only'.")
    return PeftConfig(
        r=integer(path, config, "r", 8),
        alpha=number(path, config, "lora_alpha", 8),
        rslora=switch(path, config, "use_rslora"),
        rank_pattern=mapping(path, config, "rank_pattern", whole=True),
        alpha_pattern=mapping(path, config, "alpha_pattern"),
        dora=switch(path, config, "use_dora"),
        fan_in_fan_out=switch(path, config, "fan_in_fan_out"),
        bias=bias,
        lora_bias=switch(path, config, "lora_bias"),
        modules_to_save=optional_list(path, config, "modules_to_save"),
        target_parameters=parameters,
        target_modules=names_or_pattern(path, config, "target_modules") if parameters else (),
        tokens=token_indices(path, config),
        peft_version=_version(config.get("peft_version")),
        blocks=_blocks(path, config.get("use_bdlora")),
        kasa=config.get("kasa_config") is not None,
        notes=tuple(
            f"adapter_config.json has no {field}: PEFT's default of 8 is used."
            for field in ("r", "lora_alpha")
            if config.get(field) is None
        ),
    )


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    for field, name, why in _REFUSED:
        if config.get(field):
            raise UnsupportedError(f"{path}: a {name} adapter ({field} is set) cannot be folded: {why}.")
    known = HARMLESS | _RESULT | {field for field, _, _ in _REFUSED}
    unknown = [f"{key}={value!r:.60}" for key, value in config.items() if key not in known and value]
    if unknown:
        raise UnsupportedError(
            f"{path}: adapter_config.json sets fields that loracc does not know and that may change the result: "
            f"{some(unknown)}.",
            hint="If they do not (training settings), remove them from the file.",
        )


def _blocks(path: Path, value: Any) -> BlockDiagonal | None:
    if not value:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{path}: use_bdlora in adapter_config.json is {value!r:.60}, expected an object.")
    a, b = (optional_list(path, value, f"target_modules_bd_{side}") for side in "ab")
    return BlockDiagonal(a, b, integer(path, value, "nblocks", 1))


def _check_init(path: Path, init: Any, residual_base: bool) -> None:
    if isinstance(init, bool) or init is None:
        return
    if not isinstance(init, str):
        raise InputError(f"{path}: init_lora_weights is {init!r:.60}, expected true, false or a name.")
    name = init.lower()
    if name in _PLAIN_INITS:
        return
    family = next((family for family in _RESIDUAL_INITS if name.startswith(family)), None)
    if family is None:
        raise UnsupportedError(
            f"{path}: init_lora_weights {init!r} is not known, and may have changed the base weights."
        )
    if not residual_base:
        raise UnsupportedError(
            f"{path}: init_lora_weights is {init!r}: training took a part of the base weights into A and B, so this "
            "delta belongs to the residual base and not to the original one.",
            hint="Either convert it (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), or, if "
            "the model given is the residual base, say so with --residual-base.",
        )


def _version(text: Any) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else None
