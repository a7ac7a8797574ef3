"""Heads that a checkpoint does not hold because they are tied to the embedding.

transformers leaves ``lm_head.weight`` out of a file when the configuration ties it. An adapter may change the embedding
or the head alone, so a checkpoint has to know that its one tensor is two sites. Without torch that is told by the
configuration: it does not switch the tie off, and the architecture has a head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["tied_head"]

#: Architectures with a head: (end of the name, model type, what they call the head's weight).
_HEADS: tuple[tuple[str, str, str], ...] = (
    (r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", r".*", "lm_head.weight"),
    (r"ForMaskedLM$", r"bert|electra|layoutlm|megatron-bert", "cls.predictions.decoder.weight"),
    (r"ForMaskedLM$", r"roberta|xlm-roberta|camembert|roberta-prelayernorm", "lm_head.decoder.weight"),
)
_EMBEDDING = re.compile(r"(^|.*\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight")
#: A wrapped language model of transformers before 5: its head lies inside the wrapper.
_WRAPPER = "language_model.model."


def tied_head(names: Collection[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name of the head's weight, name of the embedding's tensor), None where nothing is tied or it cannot be told.

    >>> config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    >>> tied_head(["transformer.wte.weight", "transformer.wpe.weight"], config)
    ('lm_head.weight', 'transformer.wte.weight')
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not _tied(config):
        return None
    architecture, kind = str(architectures[0]), str(config.get("model_type"))
    heads = (name for end, types, name in _HEADS if re.search(end, architecture) and re.fullmatch(types, kind))
    head = next(heads, None)
    embeddings = sorted(name for name in names if _EMBEDDING.fullmatch(name))
    if head is None or len(embeddings) != 1:
        return None
    if embeddings[0].startswith(_WRAPPER):
        head = f"language_model.{head}"
    return None if head in names else (head, embeddings[0])


def _tied(config: Mapping[str, Any]) -> bool:
    """The language model's setting; on unless switched off, as in transformers."""
    text = config.get("text_config")
    parts = [text, config] if isinstance(text, dict) else [config]
    return bool(next((part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part), True))
