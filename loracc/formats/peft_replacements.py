"""What a PEFT file holds beside factors: whole parameters that replace the base's, and rows of an embedding.

1. ``<module>.token_adapter.trainable_tokens_delta``: the new rows, not differences, of ``trainable_token_indices``.
2. ``<module>.<parameter>`` of ``modules_to_save``: every parameter and buffer of the module (older files, other
   tools keep ``modules_to_save.<adapter>`` in the key).
3. ``<module>.bias``: the trained biases of ``bias="all"`` and ``"lora_only"``.
4. ``<module>.base_layer.weight`` and an embedding's ``.weight``: a copy of the base's own (``save_embedding_layers``),
   which differs from it when the vocabulary was resized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from loracc.adapter import Entry
from loracc.deltas import Replacement, RowReplacement
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.formats.key_table import Keyed
from loracc.formats.peft_config import PeftConfig
from loracc.formats.peft_keys import BASE_LAYER, plain_path
from loracc.formats.peft_kinds import Context

__all__ = ["replacement_entries", "saved_path", "token_entry"]

#: Names that models give the embeddings that ``save_embedding_layers`` saves.
_EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings"}
)
_SAVED = "modules_to_save"
#: A batch norm's step counter: a buffer of a saved module that inference does not read.
COUNTER = "num_batches_tracked"


def replacement_entries(rest: Mapping[str, Array], context: Context, adapter: str) -> tuple[list[Entry], list[str]]:
    """(entries, keys that are none of the above).

    Args:
        rest: What the grammar left, by key without the wrapper's prefix.
        adapter: The adapter's name in the file's keys, "" where there is none.
    """
    found: dict[str, tuple[str, Replacement]] = {}
    unknown = []
    for key, array in rest.items():
        name = plain_path(saved_path(key, adapter))
        if name.endswith(f".{COUNTER}") and _is_saved(name, context.config):
            continue
        replacement = _replacement(key, name, array, context.config)
        if replacement is None:
            unknown.append(key)
        elif name in found and not np.array_equal(found[name][1].new, array):
            raise InputError(f"{context.path}: {found[name][0]!r} and {key!r} are one parameter with different values.")
        else:
            found.setdefault(name, (key, replacement))
    entries = []
    for name, (key, replacement) in found.items():
        module, _, parameter = name.rpartition(".")
        turned = context.config.fan_in_fan_out if context.config is not None and replacement.new.ndim == 2 else None
        entries.append(Entry(module, parameter, replacement, (key,), turned))
    return entries, unknown


def saved_path(key: str, adapter: str) -> str:
    """A parameter's path without ``modules_to_save`` and the adapter's name after it.

    >>> saved_path("classifier.modules_to_save.default.dense.weight", "")
    'classifier.dense.weight'
    """
    parts = key.split(".")
    if _SAVED not in parts:
        return key
    at = parts.index(_SAVED)
    named = len(parts) > at + 2 and parts[at + 1] in ("default", adapter)
    return ".".join(parts[:at] + parts[at + 1 + named :])


def _replacement(key: str, name: str, array: Array, config: PeftConfig | None) -> Replacement | None:
    """What the key's array does, None where nothing explains it. ``name`` is the parameter's path in the base model."""
    parts = key.split(".")
    module, _, parameter = name.rpartition(".")
    if config is None:
        return None
    if parameter == "bias" and (config.bias == "all" or (config.bias == "lora_only" and BASE_LAYER in parts)):
        return Replacement(array)
    if _SAVED in parts or _is_saved(name, config):
        return Replacement(array)
    copied = len(parts) > 1 and parts[-2] == BASE_LAYER and parameter in ("weight", "bias")
    if copied or (parameter in ("weight", "bias") and module.rpartition(".")[2] in _EMBEDDINGS):
        return Replacement(array, of_base=True)
    return None


def _is_saved(name: str, config: PeftConfig | None) -> bool:
    """Whether a parameter lies in a module whose path ends with one of ``modules_to_save`` (PEFT's own test)."""
    parts = name.split(".")
    modules = (".".join(parts[:stop]) for stop in range(1, len(parts)))
    wanted = config.modules_to_save if config is not None else ()
    return any(module.endswith(target) for module in modules for target in wanted)


def token_entry(path: str, tensor: Keyed, context: Context) -> Entry:
    """Rows of the embedding (or of the head tied to it) that were trained.

    Raises:
        InputError: The configuration has no such module, or another number of tokens.
    """
    module, tokens = plain_path(path), context.config.tokens if context.config is not None else None
    indices = _tokens_of(module, tokens or {})
    if indices is None:
        raise InputError(
            f"{context.path}: {tensor.key} holds token rows, and trainable_token_indices in adapter_config.json names "
            f"no {module} (it names: {', '.join(repr(name) for name in tokens or {}) or 'nothing'})."
        )
    if tensor.array.ndim != 2 or tensor.array.shape[0] != len(indices):
        raise InputError(
            f"{context.path}: {tensor.key} has shape {list(tensor.array.shape)}, and trainable_token_indices names "
            f"{len(indices)} tokens."
        )
    return Entry(module, "weight", RowReplacement(np.array(indices, np.int64), tensor.array), (tensor.key,))


def _tokens_of(module: str, tokens: Mapping[str, Iterable[int]]) -> tuple[int, ...] | None:
    named = [name for name in tokens if name and module.endswith(name)]  # PEFT's own test
    name = max(named, key=len) if named else ""
    return tuple(tokens[name]) if name in tokens else None
