"""``--task text-generation-with-past``: greedy tokens of the folded graph against unmerged PEFT's ``generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner

from loracc.cli import main
from loracc.errors import UnsupportedError
from loracc.model import LoadOptions
from loracc.sources.huggingface import load_huggingface
from loracc.tensors import PermutedTensor
from tests.decoding import PROMPT_MASK, PROMPTS, greedy
from tests.models import adapted

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers about each other, and torch's exporter
TASK = "text-generation-with-past"
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
#: Name -> (class, settings, arguments of LoraConfig). The windows are shorter than what is generated.
DECODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED, {}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 8}, {}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "num_hidden_layers": 1}, {}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**GROUPED, "sliding_window": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {},
    ),
}


def decoder(name: str, folder: Path) -> tuple[Any, Path, Path]:
    """(PEFT model that was not merged, folder of the base, folder of the adapter); weights large enough to matter."""
    kind, settings, lora = DECODERS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    model.save_pretrained(folder / "base")
    peft = adapted(model, scale=0.2, **{"target_modules": ["q_proj", "k_proj", "v_proj"], **lora})
    peft.save_pretrained(folder / "adapter")
    return peft, folder / "base", folder / "adapter"


def generated(model: Any, tokens: int) -> Any:
    return model.generate(
        input_ids=torch.from_numpy(PROMPTS), attention_mask=torch.from_numpy(PROMPT_MASK), do_sample=False,
        max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
    ).numpy()  # fmt: skip


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*arguments, "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_unmerged_peft(name: str, tmp_path: Path) -> None:
    peft, base, adapter = decoder(name, tmp_path)
    out = tmp_path / "out.onnx"
    result = run("fold", str(base), str(adapter), "-o", str(out), "--task", TASK)
    assert result["verification"]["verdict"] == "pass"
    assert result["verification"]["numbers"]["max_relative_error"] > 0  # past, mask and positions were made up to fit
    expected = generated(peft, 64)
    with peft.disable_adapter():
        assert (generated(peft, 64) != expected).any(), "the adapter changes nothing: this test could not fail"
    assert (greedy(out, 64) == expected).all()
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    axes = {value.name: (value.shape, value.type) for value in (*session.get_inputs(), *session.get_outputs())}
    past, new = "past_sequence_length", "sequence_length"
    heads = 4 if name == "gpt2" else 2
    assert axes["input_ids"] == axes["position_ids"] == (["batch_size", new], "tensor(int64)")
    assert axes["attention_mask"] == (["batch_size", f"{past} + {new}"], "tensor(int64)")
    assert axes["logits"][0] == ["batch_size", new, 99]
    for layer in range(1 if name == "qwen2" else 2):
        for part in ("key", "value"):
            assert axes[f"past_key_values.{layer}.{part}"] == (["batch_size", heads, past, 8], "tensor(float)")
            assert axes[f"present.{layer}.{part}"][0] == ["batch_size", heads, f"{past} + {new}", 8]


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (
            "MambaForCausalLM",
            {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "linear_att",
        ),
        (
            "Qwen3NextForCausalLM",
            {**GROUPED, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "head_dim": 8},
            "linear_attention",
        ),
    ],
)
def test_memory_of_another_kind_is_refused_by_name(
    kind: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    cls = getattr(transformers, kind)
    cls(cls.config_class(**settings)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=f"{kind} cannot be exported with a key-value cache.*{says}"):
        load_huggingface(tmp_path, LoadOptions(task=TASK))


def test_weights_stay_in_their_files(tmp_path: Path) -> None:
    _, base, _ = decoder("qwen2", tmp_path)
    loaded = load_huggingface(base, LoadOptions(task=TASK))
    for site in loaded.sites:
        tensor = loaded.ir.graph.initializers[site.initializer].const_value
        tensor = tensor.base if isinstance(tensor, PermutedTensor) else tensor
        assert isinstance(tensor, ir.ExternalTensor), site.name
