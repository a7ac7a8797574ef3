"""Batches to calibrate with: arrays of inputs (``.npz``), lines of text with the model's tokenizer, or made-up inputs.

Every fourth batch is *held out*: it takes no part in the rounding, and decides whether the rounding helped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from loracc.decoder_inputs import counts_tokens, decoder_sizes
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.sample_inputs import check_inputs, fed, random_inputs, vocabulary_limits
from loracc.sources.user_inputs import read_npz
from loracc.tokenizing import read_lines, tokenizer_for

__all__ = ["Batch", "calibration_batches", "digest_of"]

T = TypeVar("T")
_BATCH = 8
#: Tokens in a batch, of lines that are short: a run of few rows spends its time on being started.
_BATCH_TOKENS = 1024
#: At least this many batches, so that some can be held out.
_FEWEST = 4
#: Longest text in tokens: attention's cost is quadratic, and the moments are sums over tokens.
_LONGEST = 256
_MADE_UP = 16
#: A configuration's names for the number of positions.
_POSITIONS = ("max_position_embeddings", "n_positions")
#: More samples than these are thinned out evenly; of lines of text so many more as make up the tokens.
_MOST, _MOST_SHORT, _ENOUGH = 512, 2048, 32768


@dataclass(frozen=True)
class Batch:
    """Inputs by name, and whether they are held out."""

    inputs: Mapping[str, Array]
    held_out: bool


def calibration_batches(model: BaseModel, path: Path | None, tokenizer: Path | None, *, seed: int = 0) -> list[Batch]:
    """Everything there is to calibrate with, in the file's order.

    Args:
        model: Its graph says which inputs it takes.
        path: ``.npz`` of inputs by name, samples along the first axis; any other file is UTF-8 text, a sample a line.
            None makes inputs up.
        tokenizer: Folder of the tokenizer, for text; the model's own folder when None.
        seed: Of made-up inputs.

    Raises:
        InputError: The file cannot be read, or does not fit the model.
        MissingExtraError: Text is given, and transformers is not installed.
    """
    if path is None:
        found = _made_up(model, seed)
    elif not path.is_file():
        raise InputError(f"{path}: no such file.", hint="--calibrate takes an .npz of model inputs, or a text file.")
    elif _is_zip(path):
        found = _from_arrays(model, path)
    else:
        found = _from_text(model, path, tokenizer)
    if len(found) < _FEWEST:
        raise InputError(
            f"{path}: {len(found)} batches of samples, and one of every {_FEWEST} is held out.",
            hint="Give more samples: a few hundred are good.",
        )
    return [Batch(inputs, index % _FEWEST == _FEWEST - 1) for index, inputs in enumerate(found)]


def digest_of(batches: Sequence[Batch]) -> str:
    """SHA-256 of all inputs: names, types, shapes, bytes, and what is held out."""
    found = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.inputs.items()):
            found.update(f"{name} {array.dtype.name} {array.shape} {batch.held_out};".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _made_up(model: BaseModel, seed: int) -> list[Mapping[str, Array]]:
    limits = {**vocabulary_limits(model.ir), **{name: hi for name, (_, hi) in model.input_ranges.items()}}
    sizes = {"batch": 4, "sequence": 64}
    return [random_inputs(model.ir, seed=seed + i, limits=limits, sizes=sizes) for i in range(_MADE_UP)]


# -------------------------------------------------------------------------------------------------------------- arrays


def _from_arrays(model: BaseModel, path: Path) -> list[Mapping[str, Array]]:
    arrays = read_npz(path)
    wanted = fed(model.ir)
    missing = [str(value.name) for value in wanted if value.name not in arrays]
    if missing:
        raise InputError(
            f"{path}: no array for the model's inputs {', '.join(missing)}; it holds {', '.join(sorted(arrays))}.",
            hint="Save them by the inputs' names: numpy.savez(FILE, input_ids=..., attention_mask=...).",
        )
    arrays = {str(value.name): arrays[str(value.name)] for value in wanted}
    counts = {array.shape[0] for array in arrays.values() if array.ndim}
    if len(counts) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"{path}: the arrays do not have one number of samples along their first axis: {shapes}.")
    count = counts.pop()
    if count > _MOST:
        kept = np.array(_spread(range(count), _MOST))
        arrays = {name: array[kept] if array.ndim else array for name, array in arrays.items()}
        count = _MOST
    size = _fixed_batch(wanted) or min(_BATCH, max(1, count // _FEWEST))
    batches: list[Mapping[str, Array]] = [_cut(arrays, lo, lo + size) for lo in range(0, count - size + 1, size)]
    if not batches:
        raise InputError(f"{path}: {count} samples, and the model takes {size} at a time.")
    check_inputs(model.ir, batches[0])
    return batches


def _spread(samples: Sequence[T], most: int) -> list[T]:
    """At most so many of the samples, evenly.

    >>> _spread("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = len(samples)
    return [samples[place * count // most] for place in range(most)] if count > most else list(samples)


def _fixed_batch(values: Sequence[ir.Value]) -> int | None:
    """The size of the first axis, where the graph says it."""
    sizes = {value.shape[0] for value in values if value.shape}
    return next((size for size in sizes if isinstance(size, int)), None)


def _cut(arrays: Mapping[str, Array], lo: int, hi: int) -> dict[str, Array]:
    return {name: array[lo:hi] if array.ndim else array for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------------------------- text


def _from_text(model: BaseModel, path: Path, tokenizer: Path | None) -> list[Mapping[str, Array]]:
    every = read_lines(path)
    tokens = tokenizer_for(model, tokenizer)
    wanted = fed(model.ir)
    length, size = _fixed_length(wanted), _fixed_batch(wanted)
    longest = length or min(int(tokens.model_max_length), _positions(tokenizer or model.path), _LONGEST)
    lines, mean = _thinned(tokens, every, longest)
    if size is None:
        size = min(max(_BATCH, _BATCH_TOKENS // mean), max(1, len(lines) // _FEWEST))
    else:
        lines = lines[: len(lines) // size * size]
    batches = (lines[lo : lo + size] for lo in range(0, len(lines), size))
    encoded = [_tokenized(tokens, batch, longest, pad=length is not None) for batch in batches]
    if length is None and counts_tokens(model.ir):
        encoded = [_even(batch, left=tokens.padding_side == "left") for batch in encoded]
    sizes = decoder_sizes(model.ir)
    return [{str(value.name): _input(value, batch, sizes) for value in wanted} for batch in encoded]


def _positions(path: Path) -> int:
    """How many tokens the model takes, by the Hugging Face configuration beside it where there is one."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return _LONGEST
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{config}: cannot be read: {error}.") from error
    found = [fields.get(name) for name in _POSITIONS] if isinstance(fields, dict) else []
    return min((size for size in found if isinstance(size, int) and size > 0), default=_LONGEST)


def _thinned(tokens: Any, lines: Sequence[str], longest: int) -> tuple[list[str], int]:
    """The lines that are used, short ones first, and how many tokens one has in the mean.

    Of short lines there are more, as many as make the tokens that are enough. Neighbours of like length waste little
    padding.
    """

    def counted(some: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokens(list(some), truncation=True, max_length=longest)["input_ids"]]

    sample = counted(_spread(lines, _MOST))
    mean = max(1, sum(sample) // len(sample))
    used = _spread(lines, min(max(_MOST, _ENOUGH // mean), _MOST_SHORT))
    lengths = counted(used)
    return [used[place] for place in sorted(range(len(used)), key=lengths.__getitem__)], mean


def _fixed_length(values: Sequence[ir.Value]) -> int | None:
    ids = next((value for value in values if value.name == "input_ids"), None)
    size = ids.shape[1] if ids is not None and ids.shape is not None and len(ids.shape) > 1 else None
    return size if isinstance(size, int) else None


def _tokenized(tokens: Any, lines: Sequence[str], longest: int, *, pad: bool) -> Mapping[str, Array]:
    """A batch; ``pad``: to the longest that may be, and not to the longest that is there."""
    encoded: Mapping[str, Array] = tokens(
        list(lines),
        padding="max_length" if pad else True,
        truncation=True,
        max_length=longest,
        return_attention_mask=True,
        return_tensors="np",
    )
    return encoded


def _even(encoded: Mapping[str, Array], *, left: bool) -> Mapping[str, Array]:
    """Without padding, for a model that only sums the mask up: each line as long as the shortest of its batch."""
    length = max(1, int(encoded["attention_mask"].sum(axis=1).min()))
    return {name: array[:, -length:] if left else array[:, :length] for name, array in encoded.items()}


def _input(value: ir.Value, encoded: Mapping[str, Array], sizes: Mapping[str, int]) -> Array:
    """One input of the model from what the tokenizer gives; a decoder's cache is empty, its ``sizes`` the graph's."""
    name = str(value.name)
    kind = (value.dtype or ir.DataType.INT64).numpy()
    mask = encoded["attention_mask"]
    if name in encoded:
        return encoded[name].astype(kind)
    if name == "position_ids":
        return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(kind)
    if name == "token_type_ids":
        return np.zeros(mask.shape, kind)
    if name.startswith("past_key_values") and value.shape is not None:
        # Batch, heads, past length, size of a head.
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 0) for dim in value.shape]
        return np.zeros((len(mask), *shape[1:]), kind)
    raise InputError(
        f"input {name!r} of the model is nothing that a tokenizer gives.",
        hint="Give --calibrate an .npz of all the model's inputs.",
    )
