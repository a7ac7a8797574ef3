"""What models call their embeddings: it settles a pair of factors where neither the file nor a shape does."""

from __future__ import annotations

__all__ = ["names_embedding"]

_NAMES = frozenset(
    {
        "embed",
        "embed_in",
        "embed_tokens",
        "embedding",
        "embeddings",
        "position_embeddings",
        "shared",
        "tok_embeddings",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)


def names_embedding(module: str) -> bool:
    """Whether a module path ends as embeddings' do.

    >>> names_embedding("model.embed_tokens"), names_embedding("model.layers.0.fc1")
    (True, False)
    """
    return module.rpartition(".")[2] in _NAMES
