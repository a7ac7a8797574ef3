"""Encoder-decoders as two graphs: the encoder runs once, the decoder once for every token.

    encoder   input_ids, attention_mask                                       -> last_hidden_state
    decoder   input_ids, encoder_hidden_states, encoder_attention_mask,
              past_key_values.N.decoder.{key,value}                            -> logits, present.N.decoder.{key,value}

with optimum's names for inputs and outputs. The past is the decoder's own; what it attends to in the encoder's states
is computed in every step, so that one graph serves the first token (a past of length 0) and all that follow. Without a
cache the decoder takes all tokens at once and gives the logits of each.

A part is the whole model with another ``forward``: its modules keep their paths, and an adapter its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loracc.errors import InputError, UnsupportedError
from loracc.sources.hf_cache import CacheLayer, cache_layers, filled_cache, past_inputs
from loracc.sources.hf_inputs import BATCH, SEQUENCE, TracedInput, ids_input
from loracc.sources.hf_tasks import Task

__all__ = ["becomes_part", "check_part", "part_inputs"]

_ENCODER_SEQUENCE = "encoder_sequence_length"


def check_part(model: Any, task: Task | None, part: str | None) -> None:
    """Refuse a part of a model that has none, and a cache for the whole of one that has parts.

    Raises:
        InputError: ``--part`` is missing, or means nothing.
    """
    parts = bool(getattr(model.config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")
    if part is not None and not parts:
        raise InputError(f"--part {part}: {type(model).__name__} is no encoder-decoder.", hint="Leave --part out.")
    if parts and part is None and task is not None and task.past:
        raise InputError(
            f"{type(model).__name__}: with a cache an encoder-decoder is two graphs, an encoder and a decoder.",
            hint="Run it twice: -o encoder_model.onnx --part encoder, and -o decoder_model.onnx --part decoder.",
        )


def part_inputs(model: Any, part: str, *, past: bool) -> list[TracedInput]:
    """What a part is traced with. Call it before :func:`becomes_part`.

    Raises:
        UnsupportedError: The encoder takes something other than ids, or the decoder's cache is none of keys and values.
    """
    text = model.main_input_name == "input_ids"
    if part == "encoder":
        if not text:
            raise UnsupportedError(f"{type(model).__name__}: its encoder takes {model.main_input_name!r}, not ids.")
        return [
            ids_input("input_ids", model.config, SEQUENCE, ("batch_size", _ENCODER_SEQUENCE)),
            TracedInput("attention_mask", ("batch_size", _ENCODER_SEQUENCE), _ones(), (1, 2)),
        ]
    layers = cache_layers(model) if past else []
    states = np.zeros((BATCH, SEQUENCE, int(model.config.hidden_size)), _dtype(model))
    inputs = [
        ids_input("input_ids", model.config, SEQUENCE - 2, ("batch_size", "decoder_sequence_length")),
        TracedInput("encoder_hidden_states", ("batch_size", _ENCODER_SEQUENCE, None), states),
    ]
    if text:  # images and sound are of one length, and take no mask
        inputs.append(TracedInput("encoder_attention_mask", ("batch_size", _ENCODER_SEQUENCE), _ones(), (1, 2)))
    return [*inputs, *_own_past(layers)]


def _own_past(layers: list[CacheLayer]) -> list[TracedInput]:
    """optimum tells the decoder's own past from that of its attention to the encoder."""
    return past_inputs(layers, infix="decoder.", symbol="past_decoder_sequence_length")


def becomes_part(model: Any, part: str, *, past: bool) -> None:
    """Let ``forward`` be that part's, in place."""
    if part == "encoder":
        encoder = model.get_encoder()

        def encode(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
            found = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            return {"last_hidden_state": found.last_hidden_state}

        model.forward = encode
        return
    model.forward = _decoder(model.forward, past=past)


def _decoder(forward: Any, *, past: bool) -> Any:
    def decode(
        input_ids: Any,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any = None,
        past_key_values: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        more: dict[str, Any] = {"use_cache": False}
        if encoder_attention_mask is not None:
            more["attention_mask"] = encoder_attention_mask
        if past:
            own = filled_cache({index: states["decoder"] for index, states in (past_key_values or {}).items()})
            more |= {"use_cache": True, "past_key_values": EncoderDecoderCache(own, DynamicCache())}
        states = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        result = forward(decoder_input_ids=input_ids, encoder_outputs=states, return_dict=True, **more)
        if not past:
            return {"logits": result.logits}
        layers = result.past_key_values.self_attention_cache.layers
        present = {str(i): {"decoder": {"key": one.keys, "value": one.values}} for i, one in enumerate(layers)}
        return {"logits": result.logits, "present": present}

    return decode


def _ones() -> Any:
    return np.ones((BATCH, SEQUENCE), np.int64)


def _dtype(model: Any) -> Any:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return from_torch_dtype(model.dtype).numpy()
