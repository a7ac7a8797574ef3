"""PEFT's keys for LoRA (``peft/utils/save_and_load.py`` 0.21.2), and the module paths in them."""

from __future__ import annotations

import re

from loracc.formats.key_table import KeyRule

__all__ = ["BASE_LAYER", "LORA_RULES", "PREFIXES", "plain_path"]

#: What ``PeftModel`` and, alone, ``LoraModel`` put before every module path.
PREFIXES = ("base_model.model.",)
BASE_LAYER = "base_layer"

#: The adapter's name, which files written by hand and by other tools keep.
_NAME = r"(\.(?!weight$|bias$)(?P<name>[^.]+))?"


def _rule(role: str, parameter: str, leaf: str = "") -> KeyRule:
    return KeyRule(role, re.compile(rf"(^|\.){parameter}{_NAME}{leaf}$"))


#: Which ending means which role. Embedding factors and magnitudes are parameters and not modules: they end without
#: ``.weight`` (older files have it on the magnitude).
LORA_RULES: tuple[KeyRule, ...] = (
    _rule("A", "lora_A", r"\.weight"),
    _rule("B", "lora_B", r"\.weight"),
    _rule("B_bias", "lora_B", r"\.bias"),
    _rule("embedding_A", "lora_embedding_A"),
    _rule("embedding_B", "lora_embedding_B"),
    _rule("magnitude", "lora_magnitude_vector", r"(\.weight)?"),
    _rule("diagonal", "lora_diag"),
    _rule("tokens", r"token_adapter\.trainable_tokens_delta"),
)


def plain_path(path: str) -> str:
    """The path in the base model: without the ``base_layer`` that each wrapper puts in.

    >>> plain_path("attn.base_layer.out_proj.base_layer")
    'attn.out_proj'
    """
    return ".".join(part for part in path.split(".") if part != BASE_LAYER)
