"""LoRA beside another method, as the paper has it (LoRA+PE, LoRA+PL): LoRA is folded, the prompt or prefix stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from onnx import numpy_helper

from loracc.cli import run
from tests.models import FAMILIES, build, randomize, text_inputs, torch_inputs

# PEFT and transformers about each other, and what torch's exporters deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 4
METHODS: dict[str, Callable[[], Any]] = {
    "soft prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=16
    ),
}


class Both(torch.nn.Module):
    """A language model with PEFT's LoRA in its layers, and one of PEFT's prompts before its input."""

    def __init__(self, family: str, method: str) -> None:
        super().__init__()
        model = build(family)
        lora = FAMILIES[family].lora
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **lora), model)
        randomize(model, seed=3, scale=0.2, names=lambda name: "lora_" in name)
        model.config.use_cache = False
        self.both = peft.get_peft_model(model, METHODS[method]()).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.both(input_ids=input_ids, attention_mask=attention_mask).logits


def save_program(module: torch.nn.Module, path: Path) -> None:
    feeds = torch_inputs(text_inputs(2, 16))
    axes = dict.fromkeys(range(2), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.export.export(module, (), feeds, dynamic_shapes=dict.fromkeys(feeds, axes), strict=False)
    torch.export.save(program, path)


def save_legacy(module: torch.nn.Module, path: Path) -> None:
    feeds = torch_inputs(text_inputs(2, 16))
    axes = {name: {0: "batch", 1: "sequence"} for name in feeds}
    with torch.no_grad():
        torch.onnx.export(module, tuple(feeds.values()), path, dynamo=False, opset_version=17,
                          input_names=list(feeds), dynamic_axes=axes)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "ending"),
    [("llama", "soft prompt", ".pt2"), ("gpt2", "prefix", ".pt2"), ("llama", "prefix", ".onnx"),
     ("gpt2", "p-tuning", ".onnx")],
)  # fmt: skip
def test_lora_goes_and_the_prompt_stays(
    family: str, method: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Both(family, method).eval()
    traced, out = tmp_path / f"both{ending}", tmp_path / "out.onnx"
    (save_program if ending == ".pt2" else save_legacy)(module, traced)
    capsys.readouterr()
    assert run(["fold", str(traced), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["verdict"] == "pass"
    assert len(result["sites"]) >= {"llama": 14, "gpt2": 8}[family]

    weights = {w.name: numpy_helper.to_array(w) for w in onnx.load(out).graph.initializer}
    assert not [name for name in weights if "lora" in name]
    prompt = module.both.prompt_encoder["default"].embedding.weight.detach().numpy()
    assert any(w.shape == prompt.shape and (w == prompt).all() for w in weights.values())

    inputs = text_inputs(3, 11)
    with torch.no_grad():
        expected = module(**torch_inputs(inputs)).numpy()
        with_prompt_only = without_lora(module)(**torch_inputs(inputs)).numpy()
    [got, *_] = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, inputs)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    print(
        f"LoRA + {method:12} {family:6} {ending:6} {len(result['sites'])} deltas folded, max relative error {error:.2e}"
    )
    assert error < 1e-5 < np.abs(with_prompt_only - expected).max() / np.abs(expected).max()


def without_lora(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        if isinstance(part, peft.tuners.lora.LoraLayer):
            part.enable_adapters(False)
    return module
