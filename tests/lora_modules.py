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


def _two_dora() -> Any:
    import peft

    options: dict[str, Any] = {"target_modules": ["0", "2"], "use_dora": True}
    model: Any = peft.get_peft_model(_mlp(), peft.LoraConfig(r=2, lora_alpha=6, **options))
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=4, **options))
    model.base_model.set_adapter(["default", "second"])
    return _randomized(model)


def _merged_in_out(adapted: bool) -> Callable[[], Any]:
    """loralib's MergedLinear on a weight stored [in, out], as GPT-2's is."""

    def make() -> Any:
        import loralib
        from torch import nn

        _seeded()
        options = {"enable_lora": [True, False, True], "fan_in_fan_out": True, "merge_weights": False}
        plain = loralib.MergedLinear(12, 24, r=0, **options)
        if not adapted:
            return nn.Sequential(plain, nn.ReLU()).eval()
        layer = loralib.MergedLinear(12, 24, r=2, lora_alpha=6, **options)
        layer.load_state_dict(plain.state_dict(), strict=False)
        return _randomized(nn.Sequential(layer, nn.ReLU()))

    return make


def _signal() -> Any:
    from torch import nn

    _seeded()
    return nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 6, 1))


def _volume() -> Any:
    from torch import nn

    _seeded()
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 6, 1))


#: ``x @ A @ B * s`` beside ``x @ W`` as people write it: y = way(x, W's product, A [in, r], B [r, out], layer).
HAND_WRITTEN: dict[str, Callable[..., Any]] = {
    "scale last": lambda x, y, a, b, _: y + x @ a @ b * 0.5,
    "scale first": lambda x, y, a, b, _: 0.5 * (x @ a) @ b + y,
    "Div": lambda x, y, a, b, _: y + x @ a @ b / 4,
    "scale in A": lambda x, y, a, b, _: y + x @ (a * 3) @ b,
    "scale in B": lambda x, y, a, b, _: y + x @ a @ (b / 3),
    "scale between": lambda x, y, a, b, _: y + (x @ a * 2) @ b,
    "A @ B first": lambda x, y, a, b, _: y + x @ (a @ b),
    "columns": lambda x, y, a, b, _: (
        y + (b.transpose(-1, -2) @ (a.transpose(-1, -2) @ x.transpose(-1, -2))).transpose(-1, -2)
    ),
    "subtracted": lambda x, y, a, b, _: y - x @ a @ b,
    "cast": lambda x, y, a, b, _: y + (x.double() @ a.double() @ b.double()).float(),
    "dropout": lambda x, y, a, b, layer: y + _dropped(x, layer) @ a @ b,
    "on the weight": lambda x, y, a, b, layer: _linear(x, layer.weight + 0.5 * (a @ b).transpose(-1, -2), layer.bias),
    "linear layers": lambda x, y, a, b, _: y + _linear(_linear(x, a.transpose(-1, -2)), b.transpose(-1, -2)),
}


def _dropped(x: Any, layer: Any) -> Any:
    from torch.nn import functional

    return functional.dropout(x, 0.1, training=layer.training)


def _linear(*arguments: Any) -> Any:
    from torch.nn import functional

    return functional.linear(*arguments)


def _hand_written(adapted: bool) -> Callable[[], Any]:
    """One layer for each way, a ReLU after each."""

    def make() -> Any:
        import torch
        from torch import nn

        class Layer(nn.Linear):
            def __init__(self, way: Callable[..., Any]) -> None:
                super().__init__(12, 12)
                self.way = way
                self.lora_a, self.lora_b = (nn.Parameter(torch.zeros(shape)) for shape in ((12, 2), (2, 12)))

            def forward(self, x: torch.Tensor) -> Any:
                return self.way(x, super().forward(x), self.lora_a, self.lora_b, self)

        _seeded()
        plain = nn.Sequential(*[layer for _ in HAND_WRITTEN for layer in (nn.Linear(12, 12), nn.ReLU())])
        if not adapted:
            return plain.eval()
        made = nn.Sequential(*[layer for way in HAND_WRITTEN.values() for layer in (Layer(way), nn.ReLU())])
        made.load_state_dict(plain.state_dict(), strict=False)
        return _randomized(made)

    return make


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
    "peft dora two adapters": Case(_two_dora, _mlp, _BATCH, 2),
    "peft conv 1d": Case(_peft(_signal, target_modules=["0", "2"]), _signal, _floats(2, 3, 8), 2),
    "peft conv 3d": Case(_peft(_volume, target_modules=["0", "2"]), _volume, _floats(1, 3, 4, 4, 4), 2),
    "loralib linear": Case(_loralib_linear(True), _loralib_linear(False), _BATCH, 1),
    "loralib embedding": Case(_loralib_embedding(True), _loralib_embedding(False), _ids, 1),
    "loralib conv2d": Case(_loralib_conv(True), _loralib_conv(False), _IMAGE, 1),
    "loralib merged": Case(_loralib_merged(True), _loralib_merged(False), _BATCH, 1),
    "loralib merged [in, out]": Case(_merged_in_out(True), _merged_in_out(False), _BATCH, 1),
    "hand-written": Case(_hand_written(True), _hand_written(False), _BATCH, len(HAND_WRITTEN)),
}
