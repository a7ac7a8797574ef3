"""What a transformers model is called with, from its class and configuration: names, shapes, which axes are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.json_file import read_json_object

__all__ = ["BATCH", "PAST", "SEQUENCE", "TracedInput", "decoder_inputs", "ids_input", "plan_inputs"]

#: Lengths a model is traced with: unequal to each other, to 0 and 1, and to any likely constant of a model.
BATCH, SEQUENCE, PAST, _DECODER, _SAMPLES, _SIDE = 2, 7, 6, 5, 4000, 224
#: Attributes of a configuration that hold a vocabulary's size.
_VOCABULARY = ("vocab_size", "n_vocab")


@dataclass(frozen=True)
class TracedInput:
    """One input.

    Attributes:
        name: Keyword of ``forward``.
        symbols: Per axis its symbol, None where the length is fixed.
        array: What the model is traced with.
        range: Half-open range of sampled integers, None for floats.
    """

    name: str
    symbols: tuple[str | None, ...]
    array: Array
    range: tuple[int, int] | None = None


def plan_inputs(model: Any, folder: Path) -> list[TracedInput]:
    """The inputs of a transformers model.

    Text models get ``input_ids`` and ``attention_mask`` (and ``token_type_ids`` where the folder's tokenizer makes
    them), encoder-decoders ``decoder_input_ids`` too, vision models ``pixel_values``, audio models their waveform.

    Raises:
        UnsupportedError: The class takes something else.
    """
    main, accepted = model.main_input_name, set(inspect.signature(model.forward).parameters)
    if main == "input_ids":
        inputs = _text(model, accepted, folder)
    elif main == "pixel_values":
        inputs = [_pixels(model.config)]
    elif main == "input_values":
        inputs = [TracedInput(main, ("batch", "samples"), np.zeros((BATCH, _SAMPLES), np.float32))]
    elif main == "input_features" and getattr(model.config, "max_source_positions", None):
        mel, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions  # Whisper: two strided layers
        inputs = [TracedInput(main, ("batch", None, None), np.zeros((BATCH, mel, frames), np.float32))]
    else:
        raise UnsupportedError(
            f"{folder}: {type(model).__name__} takes {main!r}, for which loracc has no sample.",
            hint="Give samples: --inputs FILE.npz, or --input NAME:DTYPE[SHAPE] for each input.",
        )
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs.append(ids_input("decoder_input_ids", model.config, _DECODER, ("batch", "decoder_sequence")))
    return inputs


def decoder_inputs(model: Any) -> list[TracedInput]:
    """Ids, mask and positions of a decoder that continues a past; axes named as optimum names them."""
    axes, total = ("batch_size", "sequence_length"), "past_sequence_length + sequence_length"
    inputs = [
        ids_input("input_ids", model.config, SEQUENCE, axes),
        TracedInput("attention_mask", (axes[0], total), np.ones((BATCH, PAST + SEQUENCE), np.int64), (1, 2)),
    ]
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = np.broadcast_to(np.arange(PAST, PAST + SEQUENCE, dtype=np.int64), (BATCH, SEQUENCE)).copy()
        inputs.append(TracedInput("position_ids", axes, positions))
    return inputs


def _text(model: Any, accepted: set[str], folder: Path) -> list[TracedInput]:
    inputs = [ids_input("input_ids", model.config, SEQUENCE, ("batch", "sequence"))]
    ones = np.ones((BATCH, SEQUENCE), np.int64)
    if "attention_mask" in accepted:
        inputs.append(TracedInput("attention_mask", ("batch", "sequence"), ones, (1, 2)))
    kinds = getattr(model.config, "type_vocab_size", 0)
    if kinds and "token_type_ids" in accepted and "token_type_ids" in _tokenizer_outputs(folder):
        inputs.append(TracedInput("token_type_ids", ("batch", "sequence"), 0 * ones, (0, kinds)))
    if "pixel_values" in accepted and getattr(model.config, "vision_config", None) is not None:
        inputs.append(_pixels(model.config.vision_config, batch="image_batch"))
    return inputs


def ids_input(name: str, config: Any, length: int, symbols: tuple[str, str]) -> TracedInput:
    """Tokens ``[batch, length]`` of the configuration's vocabulary."""
    text = config.get_text_config()
    size = next((getattr(text, key) for key in _VOCABULARY if getattr(text, key, None)), None)
    stop = int(size) if size else 2
    array = np.arange(BATCH * length, dtype=np.int64).reshape(BATCH, length) % stop
    return TracedInput(name, symbols, array, (0, stop))


def _pixels(config: Any, batch: str = "batch") -> TracedInput:
    """Images of the configuration's size. A convolution net names none and takes any."""
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, Sequence) else (size or _SIDE, size or _SIDE)
    free = size is None
    array = np.zeros((BATCH, getattr(config, "num_channels", 3), height, width), np.float32)
    return TracedInput("pixel_values", (batch, None, "height" if free else None, "width" if free else None), array)


def _tokenizer_outputs(folder: Path) -> Sequence[str]:
    """What the folder's tokenizer makes; a folder without one is called with ids and mask."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    try:
        config = read_json_object(path)
    except InputError:  # transformers itself never reads it here, so it is no reason to refuse the model
        return ()
    named = config.get("model_input_names")
    if isinstance(named, list):
        return [str(name) for name in named]
    import transformers

    tokenizer = getattr(transformers, str(config.get("tokenizer_class")), None)
    return list(getattr(tokenizer, "model_input_names", ()))
