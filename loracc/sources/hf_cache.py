"""Decoders with a key-value cache: one graph that both reads a prompt (an empty past) and continues it.

The names are those that ONNX Runtime's clients (optimum, transformers.js) look for. Of layer N, all of them
[batch_size, heads, tokens, head size], where "tokens" is

    past_key_values.N.key, past_key_values.N.value   past_sequence_length
    present.N.key, present.N.value                   past_sequence_length + sequence_length

A layer with a sliding window keeps its whole past, as in optimum's graphs: clients append to it, and the mask hides
what lies outside the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.sources.hf_inputs import BATCH, PAST, SEQUENCE, TracedInput
from loracc.sources.torch_trace import reason_of

__all__ = ["CacheLayer", "cache_layers", "filled_cache", "past_inputs", "with_cache"]

_PAST_SYMBOL = "past_sequence_length"
#: Attention whose cache is a key and a value per token of the past; the rest (states, shared caches) is something else.
_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a token: [heads, size] of its key and of its value, in this dtype."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: ir.DataType


def cache_layers(model: Any) -> list[CacheLayer]:
    """The cache of each layer, as the model itself fills it; run on fake tensors, so nothing is computed.

    Raises:
        UnsupportedError: The model keeps something other than keys and values, or does not run without other inputs.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if _argument(model) is None:
        raise _refused(model, "it takes no cache")
    if other := sorted(set(_layer_types(model)) - _LAYERS):
        raise _refused(
            model, f"it has layers of the kind {', '.join(other)}, whose memory is not a key and a value per token"
        )
    buffers = [(module, dict(module._buffers)) for module in model.modules()]  # some rotary tables replace themselves
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.ones((BATCH, SEQUENCE), dtype=torch.int64)
            result = model(**_probe(model, ids), use_cache=True, return_dict=True)
    except Exception as error:  # a library's boundary
        raise _refused(model, f"it does not run on ids alone ({reason_of(error)})") from error
    finally:
        for module, before in buffers:
            module._buffers.update(before)
    cache = getattr(result, "cache", None) or getattr(result, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder's: its own, and that of the encoder
    layers = list(getattr(cache, "layers", ()))
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise _refused(model, "some of its layers have no key-value cache of their own")
    found = []
    for layer in layers:
        shapes = [tuple(t.shape) for t in (layer.keys, layer.values)]
        if any(len(shape) != 4 or shape[0] != BATCH or shape[2] != SEQUENCE for shape in shapes):
            raise _refused(model, f"its cache has shapes {shapes[0]} and {shapes[1]}, not [batch, heads, tokens, size]")
        (_, heads, _, size), (_, value_heads, _, value_size) = shapes
        found.append(CacheLayer((heads, size), (value_heads, value_size), _dtype(layer.keys)))
    return found


def _probe(model: Any, ids: Any) -> dict[str, Any]:
    """The least that a model runs on."""
    import torch

    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    from transformers.modeling_outputs import BaseModelOutput

    states = torch.zeros((BATCH, SEQUENCE, int(model.config.hidden_size)), dtype=model.dtype)
    return {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}


def past_inputs(layers: list[CacheLayer], *, infix: str = "", symbol: str = _PAST_SYMBOL) -> list[TracedInput]:
    """The past as inputs of the graph, in the order key, value of layer 0, 1, ..."""
    symbols = ("batch_size", None, symbol, None)
    return [
        TracedInput(
            f"past_key_values.{index}.{infix}{part}", symbols, np.zeros((BATCH, heads, PAST, size), layer.dtype.numpy())
        )
        for index, layer in enumerate(layers)
        for part, (heads, size) in (("key", layer.key), ("value", layer.value))
    ]


def with_cache(model: Any) -> None:
    """Let ``forward`` take ``past_key_values={"0": {"key", "value"}, ...}`` and return ``logits`` and ``present``."""
    forward, argument = model.forward, _argument(model)
    assert argument is not None
    takes_positions = "position_ids" in inspect.signature(forward).parameters

    def cached(
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any = None,
        past_key_values: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        cache = filled_cache(past_key_values or {})
        more = {"position_ids": position_ids} if takes_positions else {}
        result = forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, return_dict=True,
            **more, **{argument: cache},
        )  # fmt: skip
        present = {str(i): {"key": layer.keys, "value": layer.values} for i, layer in enumerate(cache.layers)}
        return {"logits": result.logits, "present": present}

    model.forward = cached


def filled_cache(past: Mapping[str, Mapping[str, Any]]) -> Any:
    """A cache of growing layers that holds the past. Layers are filled by hand: ``update`` would append to an empty
    tensor, which is an operator more for each."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for states in past.values():
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.keys, layer.values = states["key"], states["value"]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


def _argument(model: Any) -> str | None:
    """What this version of transformers calls the cache."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def _layer_types(model: Any) -> list[str]:
    config = model.config.get_text_config()
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        return ["shared keys and values"]
    types = getattr(config, "layer_types", None)
    return [str(kind) for kind in types] if types else []


def _dtype(tensor: Any) -> ir.DataType:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return from_torch_dtype(tensor.dtype)


def _refused(model: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} cannot be exported with a key-value cache: {reason}.",
        hint="Leave -with-past out of --task, or export it with the tool you serve it with and give that .onnx file.",
    )
