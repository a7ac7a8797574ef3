"""The retrieval score, computed by the same code whatever runs the model.

An `Encoder` takes a tokenizer's arrays and returns the last hidden states: PyTorch, PEFT and ONNX Runtime each become
one in `encoders.py`. Sentence vectors are what all-MiniLM-L6-v2 was trained for: the mean over the real tokens,
normalised.

MRR, the mean reciprocal rank: 1 when every query's own name comes first, 1/2 when each comes second, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samples.minilm.dataset import Pair

Vectors = NDArray[np.float32]
Batch = Mapping[str, NDArray[np.int64]]
Encoder = Callable[[Batch], Vectors]
Tokenizer = Callable[..., Mapping[str, Any]]

BATCH_SIZE = 32
MAX_TOKENS = 64


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """One padded batch of `input_ids`, `attention_mask` and what else the tokenizer gives, as int64."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    return {name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()}


def embed(run: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> Vectors:
    """One unit vector per text, in the order given.

    Batches are cut from the texts sorted by length, which saves most of the padding; the cut depends on nothing but the
    texts, so every encoder sees the same batches.
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    vectors: dict[int, Vectors] = {}
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = tokenize(tokenizer, [texts[i] for i in chosen])
        pooled = mean_pool(run(batch), batch["attention_mask"])
        vectors.update(zip(chosen, pooled, strict=True))
    return np.stack([vectors[i] for i in range(len(texts))])


def mean_pool(hidden: Vectors, mask: NDArray[np.int64]) -> Vectors:
    """The normalised mean of the hidden states [batch, sequence, width] over the tokens that are no padding."""
    weights = mask[:, :, None].astype(np.float32)
    mean = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    unit: Vectors = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def ranks(queries: Vectors, names: Vectors) -> NDArray[np.int64]:
    """Of each query i, the rank of name i among all names: 1 is best, and a tie counts against the model."""
    similarity = queries @ names.T
    own = np.diagonal(similarity)[:, None]
    rank: NDArray[np.int64] = (similarity >= own).sum(axis=1)
    return rank


def mrr(run: Encoder, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> float:
    """The mean reciprocal rank of the right name among the names of all pairs."""
    queries = embed(run, tokenizer, [pair.query for pair in pairs])
    names = embed(run, tokenizer, [pair.name for pair in pairs])
    return float((1.0 / ranks(queries, names)).mean())
