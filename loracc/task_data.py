"""Data with answers, to score a task on: labels beside the user's inputs, or text with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.sample_inputs import check_inputs, fed
from loracc.sources.user_inputs import read_npz
from loracc.tokenizing import read_lines, tokenizer_for

__all__ = ["IGNORED", "TaskData", "from_labels", "from_text"]

#: A position that has no answer, as in PyTorch's cross entropy.
IGNORED = -100
#: The first lines of a text, tokens of each, and lines run at once: the reference runs in double precision.
_LINES, _LONGEST, _BATCH = 16, 128, 4


@dataclass(frozen=True)
class TaskData:
    """Inputs by name and, for each, the right class of every row or position."""

    inputs: tuple[Mapping[str, Array], ...]
    labels: tuple[Array, ...]


def from_labels(path: str | Path, inputs: Mapping[str, Array]) -> TaskData:
    """``--labels FILE.npz`` beside ``--inputs``: an integer array "labels", [batch] or [batch, sequence].

    Raises:
        InputError: No such file or array, no inputs that the labels are for, or another number of rows.
    """
    if not inputs:
        raise InputError(f"{path}: labels of which inputs?", hint="Give them too: --inputs FILE.npz.")
    arrays = read_npz(path)
    if "labels" not in arrays or not np.issubdtype(arrays["labels"].dtype, np.integer):
        raise InputError(f"{path}: expected an integer array 'labels', the file holds {', '.join(sorted(arrays))}.")
    labels = arrays["labels"]
    rows = {len(array) for array in inputs.values() if array.ndim}
    if labels.ndim not in (1, 2) or (rows and len(labels) not in rows):
        raise InputError(f"{path}: labels of shape {list(labels.shape)} for inputs of {sorted(rows)} rows.")
    return TaskData((inputs,), (labels,))


def from_text(path: str | Path, model: BaseModel, tokenizer: str | Path | None = None) -> TaskData:
    """``--text FILE``: the first lines as input_ids; the answer at each position is the token that follows.

    Args:
        path: UTF-8 text, a sample a line.
        model: Its folder, or the folder it lies in, holds the tokenizer.
        tokenizer: Another folder for it.

    Raises:
        InputError: No text, no tokenizer, or an input that a tokenizer does not make.
        MissingExtraError: transformers is not installed.
    """
    lines = read_lines(Path(path))[:_LINES]
    tokens = tokenizer_for(model, Path(tokenizer) if tokenizer else None)
    found = [_batch(tokens, lines[lo : lo + _BATCH], model) for lo in range(0, len(lines), _BATCH)]
    return TaskData(tuple(inputs for inputs, _ in found), tuple(labels for _, labels in found))


def _batch(tokens: Any, lines: Sequence[str], model: BaseModel) -> tuple[dict[str, Array], Array]:
    encoded = tokens(list(lines), padding=True, truncation=True, max_length=_LONGEST, return_tensors="np")
    mask = np.asarray(encoded["attention_mask"])
    made = {name: np.asarray(array) for name, array in encoded.items()}
    made.setdefault("token_type_ids", np.zeros_like(mask))
    made["position_ids"] = np.broadcast_to(np.arange(mask.shape[1]), mask.shape).copy()
    wanted = fed(model.ir)
    if missing := [str(value.name) for value in wanted if value.name not in made]:
        raise InputError(f"text gives no value for the model's inputs {', '.join(missing)}.", hint="Give --inputs.")
    inputs = {str(v.name): made[str(v.name)].astype(v.dtype.numpy() if v.dtype else np.int64) for v in wanted}
    check_inputs(model.ir, inputs)
    labels = np.full(mask.shape, IGNORED, np.int64)
    labels[:, :-1] = np.where(mask[:, :-1] * mask[:, 1:] > 0, made["input_ids"][:, 1:], IGNORED)
    return inputs, labels
