"""The task's own score of base, unfused and folded model: accuracy, and perplexity where positions have answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.proof.metrics import Outputs
from loracc.task_data import IGNORED

__all__ = ["task_scores"]


def task_scores(runs: Mapping[str, Outputs], labels: Sequence[Array]) -> dict[str, dict[str, float]]:
    """Scores by model: "accuracy" and, of language models, "perplexity".

    Args:
        runs: The outputs of each model, one dictionary for each of ``labels``.
        labels: Integers, [batch] for logits [batch, classes] or [batch, sequence] for [batch, sequence, vocabulary];
            -100 is no answer.

    Raises:
        InputError: No output has logits of such a shape.
    """
    name = _logits(next(iter(runs.values()))[0], labels[0])
    return {model: _score([draw[name] for draw in outputs], labels) for model, outputs in runs.items()}


def _logits(outputs: Mapping[str, Array], labels: Array) -> str:
    fitting = [name for name, array in outputs.items() if array.shape[:-1] == labels.shape and array.ndim > 1]
    if not fitting:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise InputError(f"labels of shape {list(labels.shape)} are for none of the outputs ({shapes}).")
    return next((name for name in fitting if "logits" in name), fitting[0])


def _score(logits: Sequence[Array], labels: Sequence[Array]) -> dict[str, float]:
    right = count = 0
    loss = 0.0
    for scores, answers in zip(logits, labels, strict=True):
        there = answers != IGNORED
        rows, wanted = scores[there].astype(np.float64), answers[there]
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < rows.shape[-1]):
            raise InputError(
                f"labels reach from {wanted.min()} to {wanted.max()}, the model knows {rows.shape[-1]} classes."
            )
        right += int(np.count_nonzero(rows.argmax(-1) == wanted))
        count += wanted.size
        shifted = rows - rows.max(-1, keepdims=True)
        loss += float(np.sum(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(wanted)), wanted]))
    if not count:
        raise InputError("every label is -100: there is nothing to score.")
    found = {"accuracy": right / count}
    return found | {"perplexity": math.exp(min(loss / count, 700.0))} if labels[0].ndim > 1 else found
