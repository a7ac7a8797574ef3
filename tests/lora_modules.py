"""Modules with LoRA inside, next to the same module without it: what raising must take apart.

Every builder is seeded, gives modules in eval mode, and leaves no adapter parameter zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

__all__ = ["CASES", "EXPORTERS", "Case", "export", "legacy_text_model", "plain_export", "with_bias"]

EXPORTERS = ("dynamo", "optimized", "legacy")


@dataclass(frozen=True)
class Case:
    """A pair of modules.

    Attributes:
        adapted: Builds the module with LoRA inside.
        plain: Builds the same module without it.
        inputs: Example inputs.
        deltas: How many weights must be found to carry a delta.
    """

    adapted: Callable[[], Any]
    plain: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    deltas: int = 1


def export(module: Any, inputs: tuple[Any, ...], exporter: str) -> Any:
    """The module as an ``ir.Model``: through loracc's front end, torch's default export, or its legacy exporter."""
    import io
    import warnings

    import onnx
    import onnx_ir as ir
    import torch

    from loracc.quiet import quiet
    from loracc.sources.torch_export import to_ir
    from loracc.sources.torch_trace import TORCH_LOGGERS

    with torch.no_grad(), quiet(*TORCH_LOGGERS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter's deprecation, and PEFT's tracer warnings
        if exporter == "legacy":
            buffer: Any = io.BytesIO()
            torch.onnx.export(module, inputs, buffer, dynamo=False, opset_version=17)
            return ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))
        program = torch.export.export(module, inputs, strict=False)
        if exporter == "dynamo":
            return to_ir(program)
        result = torch.onnx.export(program, dynamo=True, verbose=False)
        assert result is not None
        return result.model


def legacy_text_model(model: Any, feeds: Mapping[str, np.ndarray]) -> Any:
    """A transformers model through the legacy exporter, batch and sequence dynamic."""
    import io
    import warnings

    import onnx
    import onnx_ir as ir
    import torch

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]

    buffer: Any = io.BytesIO()
    inputs = tuple(torch.from_numpy(array) for array in feeds.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter's deprecation and the tracer's warnings
        torch.onnx.export(
            Outer(),
            inputs,
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=list(feeds),
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in feeds},
        )
    return ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))


def plain_export(name: str, exporter: str) -> Any:
    """A case's module without LoRA, exported once for all cases that have the same."""
    import onnx
    import onnx_ir as ir

    case = CASES[name]
    return ir.serde.deserialize_model(onnx.load_from_string(_plain_bytes(case.plain, case.inputs, exporter)))


@cache
def _plain_bytes(plain: Callable[[], Any], inputs: Callable[[], tuple[Any, ...]], exporter: str) -> bytes:
    import onnx_ir as ir

    return ir.serde.serialize_model(export(plain(), inputs(), exporter)).SerializeToString()


def _seeded() -> None:
    import torch

    torch.manual_seed(0)


def _floats(*shape: int) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        import torch

        return (torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32)),)

    return make


def _ids() -> tuple[Any, ...]:
    import torch

    return (torch.from_numpy(np.random.default_rng(0).integers(0, 50, (2, 5))),)


def _mlp() -> Any:
    from torch import nn

    _seeded()
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


def _gpt2_mlp() -> Any:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    _seeded()
    module = nn.Sequential(Conv1D(20, 12), nn.ReLU(), Conv1D(8, 20))  # type: ignore[no-untyped-call]
    with_bias(module)
    return module


def with_bias(module: Any) -> None:
    """Random biases, so that a lost one is seen."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()


def _embedding() -> Any:
    from torch import nn

    _seeded()
    return nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 8))


def _conv() -> Any:
    from torch import nn

    _seeded()
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 1))


def _peft(base: Callable[[], Any], **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=6, **config))
        return _randomized(model)

    return make


def _randomized(module: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def _two_adapters() -> Any:
    import peft

    model: Any = peft.get_peft_model(_mlp(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    return _randomized(model)


def _loralib_layer(name: str, **arguments: Any) -> Callable[[bool], Callable[[], Any]]:
    """loralib merges when told to eval, unless ``merge_weights=False``."""

    def of(adapted: bool) -> Callable[[], Any]:
        def make() -> Any:
            import loralib
            from torch import nn

            positional = arguments.get("positional", ())
            plain_options = arguments.get("plain", {})
            plain_class = getattr(nn, arguments.get("plain_class", name))
            _seeded()
            plain = plain_class(*positional, **plain_options)
            if not adapted:
                return nn.Sequential(plain, nn.ReLU()).eval()
            layer = getattr(loralib, name)(
                *positional, r=2, lora_alpha=6, merge_weights=False, **plain_options, **arguments.get("lora", {})
            )
            state = plain.state_dict()
            if name.startswith("Conv"):
                state = {f"conv.{key}": value for key, value in state.items()}
            layer.load_state_dict(state, strict=False)
            return _randomized(nn.Sequential(layer, nn.ReLU()))

        return make

    return of


_loralib_linear = _loralib_layer("Linear", positional=(12, 20))
_loralib_embedding = _loralib_layer("Embedding", positional=(50, 12))
_loralib_conv = _loralib_layer("Conv2d", positional=(3, 8, 3), plain={"padding": 1})
_loralib_merged = _loralib_layer(
    "MergedLinear", positional=(12, 24), plain_class="Linear", lora={"enable_lora": [True, False, True]}
)

_ROWS, _BATCH, _IMAGE = _floats(4, 12), _floats(2, 4, 12), _floats(2, 3, 8, 8)

CASES: dict[str, Case] = {
    "peft linear": Case(_peft(_mlp, target_modules=["0", "2"], lora_dropout=0.1), _mlp, _ROWS, 2),
    "peft linear 3d": Case(_peft(_mlp, target_modules=["0", "2"], use_rslora=True), _mlp, _BATCH, 2),
    "peft linear bias": Case(_peft(_mlp, target_modules=["0"], lora_bias=True), _mlp, _ROWS, 1),
    "peft two adapters": Case(_two_adapters, _mlp, _BATCH, 2),
    "peft conv1d": Case(_peft(_gpt2_mlp, target_modules=["0", "2"], fan_in_fan_out=True), _gpt2_mlp, _BATCH, 2),
    "peft embedding": Case(_peft(_embedding, target_modules=["0"]), _embedding, _ids, 1),
    "peft conv2d": Case(_peft(_conv, target_modules=["0", "2"]), _conv, _IMAGE, 2),
    "peft dora": Case(_peft(_mlp, target_modules=["0", "2"], use_dora=True), _mlp, _BATCH, 2),
    "peft dora 2d": Case(_peft(_mlp, target_modules=["0", "2"], use_dora=True), _mlp, _ROWS, 2),
    "peft dora conv1d": Case(
        _peft(_gpt2_mlp, target_modules=["0", "2"], fan_in_fan_out=True, use_dora=True),
        _gpt2_mlp,
        _BATCH,
        2,
    ),
    "peft dora embedding": Case(_peft(_embedding, target_modules=["0"], use_dora=True), _embedding, _ids, 1),
    "peft dora conv2d": Case(_peft(_conv, target_modules=["0", "2"], use_dora=True), _conv, _IMAGE, 2),
    "loralib linear": Case(_loralib_linear(True), _loralib_linear(False), _BATCH, 1),
    "loralib embedding": Case(_loralib_embedding(True), _loralib_embedding(False), _ids, 1),
    "loralib conv2d": Case(_loralib_conv(True), _loralib_conv(False), _IMAGE, 1),
    "loralib merged": Case(_loralib_merged(True), _loralib_merged(False), _BATCH, 1),
}
