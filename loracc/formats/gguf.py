"""GGUF adapters (llama.cpp): ``<GGUF name of the weight>.lora_a`` and ``.lora_b``, alpha in the header.

1. s = α/r, and 1 with α = 0 (``llama-adapter.cpp``). rsLoRA is lost in the conversion to GGUF.
2. lora_a is ``[r, in]`` and lora_b ``[out, r]``; of ``token_embd`` lora_a is ``[num, r]``.
3. Names are found by asking the ``gguf`` package for the GGUF name of each of the base's module paths.
4. llama.cpp keeps the rows of query and key projections of some architectures in another order than Hugging Face
   (``LlamaModel.permute`` in its converter); undoing it needs the number of heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loracc.adapter import Adapter, Entry
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError, combined, require
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.gguf_file import has_gguf_magic
from loracc.formats.key_table import Keyed, KeyRule, group, unknown_keys
from loracc.formats.tensors import check_tensors, digest_of

__all__ = ["is_gguf", "read_gguf_adapter"]

_RULES = (KeyRule("a", re.compile(r"\.weight\.lora_a$")), KeyRule("b", re.compile(r"\.weight\.lora_b$")))
_EMBEDDING = "token_embd"
#: Architectures whose query and key rows llama.cpp reorders, and whose rows it leaves as they are.
_REORDERED = frozenset({"llama", "llama-embed", "arcee", "smollm3", "granite", "granitemoe", "olmo"})
_STRAIGHT = frozenset(
    {"qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "starcoder2", "llama4", "apertus"}
)


def is_gguf(source: AdapterSource) -> bool:
    """Whether the file is GGUF."""
    return has_gguf_magic(source.file)


def read_gguf_adapter(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read what ``convert_lora_to_gguf.py`` wrote.

    Raises:
        InputError: It is a model, or its tensors are not pairs, or the number of heads is asked for.
        UnsupportedError: aLoRA, another kind of adapter, or an architecture whose row order is not known.
        NumericsError: A tensor holds inf or NaN.
    """
    path, header = source.file, source.metadata
    _check_header(path, header)
    check_tensors(path, source.tensors)
    grouped = group(path, source.tensors, _RULES)
    if grouped.rest:
        raise unknown_keys(path, "GGUF", grouped.rest)
    alpha = float(header.get("adapter.lora.alpha", "0"))
    entries: list[Entry] = []
    errors: list[LoraccError] = []
    architecture = header["general.architecture"]
    for module, roles in grouped.modules.items():
        try:
            entries.append(_entry(module, roles, alpha, architecture, options, path))
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Adapter(
        name=name,
        path=str(source.path),
        format="gguf",
        entries=tuple(entries),
        notes=("the file does not say whether the adapter was rsLoRA: llama.cpp takes alpha/r.",),
        config=dict(header),
        digested=digest_of(source.tensors, {**header, **options.facts()}),
        naming=_naming(path, architecture, grouped.modules),
    )


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    if header.get("general.type") != "adapter":
        raise InputError(f"{path}: a GGUF {header.get('general.type', 'file')}, and an adapter is expected here.")
    if header.get("adapter.type") != "lora":
        raise UnsupportedError(f"{path}: a GGUF adapter of type {header.get('adapter.type')!r}; loracc reads lora.")
    if "adapter.alora.invocation_tokens" in header:
        raise UnsupportedError(
            f"{path}: an aLoRA adapter cannot be folded: it acts only on the tokens after its invocation string, and a "
            "weight has none."
        )
    if "general.architecture" not in header:
        raise InputError(f"{path}: the header does not say general.architecture.")


def _naming(path: Path, architecture: str, modules: Mapping[str, Any]) -> Callable[[str], str | None]:
    """The GGUF name of a module path of a Hugging Face model."""
    gguf: Any = require("gguf", "read GGUF adapters")
    found = [arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture]
    if not found:
        raise UnsupportedError(f"{path}: architecture {architecture!r} is not known to the installed gguf package.")
    blocks = [int(match[1]) for module in modules if (match := re.match(r"blk\.(\d+)\.", module))]
    names = gguf.get_tensor_name_map(found[0], max(blocks, default=0) + 1)
    naming: Callable[[str], str | None] = names.get_name
    return naming


def _entry(
    module: str, roles: Mapping[str, Keyed], alpha: float, architecture: str, options: AdapterOptions, path: Path
) -> Entry:
    keys = tuple(keyed.key for keyed in roles.values())
    if set(roles) != {"a", "b"}:
        raise InputError(f"{path}: only {keys[0]} is there: lora_a and lora_b come in pairs.")
    a, b = roles["a"].array, roles["b"].array
    if module == _EMBEDDING:
        a = a.T
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InputError(f"{path}: {keys[0]} {list(a.shape)} and {keys[1]} {list(b.shape)} are no pair of factors.")
    rank = a.shape[0]
    scale = alpha / rank if alpha else 1.0
    if module == _EMBEDDING:
        return Entry(module, "weight", LowRank(np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), scale), keys)
    return Entry(module, "weight", LowRank(a, _straight(module, b, architecture, options, path), scale), keys)


def _straight(module: str, b: Array, architecture: str, options: AdapterOptions, path: Path) -> Array:
    """B with its rows in Hugging Face's order."""
    role = module.rpartition(".")[2]
    if architecture not in _REORDERED | _STRAIGHT:
        raise UnsupportedError(
            f"{path}: {module}: whether llama.cpp reorders the rows of {architecture!r} is not known to loracc.",
            hint=f"Known: {', '.join(sorted(_REORDERED | _STRAIGHT))}. Use the adapter that the GGUF was made from.",
        )
    if architecture in _STRAIGHT or role not in ("attn_q", "attn_k"):
        return b
    if options.describe:
        return b
    if options.heads is None:
        raise InputError(
            f"{path}: {module}: llama.cpp reorders the rows of {architecture}'s query and key projections by heads, "
            "and the file does not say how many there are.",
            hint="Give the base's num_attention_heads and num_key_value_heads: --gguf-heads 32,8",
        )
    heads = options.heads[role == "attn_k"]
    if b.shape[0] % (2 * heads):
        raise InputError(f"{path}: {module}: {b.shape[0]} rows are not {heads} heads of an even size (--gguf-heads).")
    split = b.reshape(heads, b.shape[0] // heads // 2, 2, b.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(b.shape)
