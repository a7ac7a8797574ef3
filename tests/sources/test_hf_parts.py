"""``--part``: an encoder-decoder as two graphs; greedy tokens of both together against unmerged PEFT's ``generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner

from loracc.cli import main
from tests.models import adapted

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers about each other, and torch's exporter
TASK = "text2text-generation"
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
#: Name -> (class, settings, targets of the adapter).
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "t5": ("T5ForConditionalGeneration", T5, ["q", "v", "wo"]),
    "bart": ("BartForConditionalGeneration", BART, ["q_proj", "v_proj", "fc1"]),
}
IDS = np.array([[5, 17, 33, 60, 7], [11, 4, 90, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TOKENS = 24


def model(name: str, folder: Path) -> tuple[Any, Path, Path]:
    kind, settings, targets = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = cls(cls.config_class(**settings, **special)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    base.save_pretrained(folder / "base")
    peft = adapted(base, scale=0.3, target_modules=targets)
    peft.save_pretrained(folder / "adapter")
    return peft, folder / "base", folder / "adapter"


def fold(base: Path, adapter: Path, out: Path, *more: str) -> Any:
    arguments = ["fold", str(base), str(adapter), "-o", str(out), "--json", "--quiet", *more]
    return CliRunner().invoke(main, arguments)


def generated(peft: Any) -> Any:
    return peft.generate(
        input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK), do_sample=False, num_beams=1,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, eos_token_id=None, forced_eos_token_id=None,
    ).numpy()[:, 1:]  # fmt: skip


def greedy(encoder: Path, decoder: Path) -> Any:
    states = onnxruntime.InferenceSession(encoder).run(None, {"input_ids": IDS, "attention_mask": MASK})[0]
    session = onnxruntime.InferenceSession(decoder)
    past = {
        value.name: np.zeros((len(IDS), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs()]
    token, found = np.zeros((len(IDS), 1), np.int64), []
    for _ in range(TOKENS):
        feeds = {"input_ids": token, "encoder_hidden_states": states, "encoder_attention_mask": MASK, **past}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        token = outputs["logits"][:, -1:].argmax(-1)
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(token)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_both_graphs_together_generate_what_peft_does(name: str, tmp_path: Path) -> None:
    peft, base, adapter = model(name, tmp_path)
    sites = 0
    for part in ("encoder", "decoder"):
        result = fold(base, adapter, tmp_path / f"{part}.onnx", "--task", f"{TASK}-with-past", "--part", part)
        assert result.exit_code == 0, result.output
        body = json.loads(result.stdout)
        assert body["verification"]["verdict"] == "pass"
        assert any("the model's other part" in note for note in body["notes"])
        sites += len(body["sites"])
    assert sites == sum(1 for key, _ in peft.named_parameters() if ".lora_A." in key)
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    names = [value.name for value in session.get_inputs()]
    assert names[:3] == ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    assert names[3:5] == ["past_key_values.0.decoder.key", "past_key_values.0.decoder.value"]
    assert (greedy(tmp_path / "encoder.onnx", tmp_path / "decoder.onnx") == generated(peft)).all()


def test_a_decoder_without_a_cache_gives_all_logits(tmp_path: Path) -> None:
    peft, base, adapter = model("t5", tmp_path)
    result = fold(base, adapter, tmp_path / "out.onnx", "--task", TASK, "--part", "decoder")
    assert result.exit_code == 0, result.output
    states = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    feeds = {"input_ids": IDS[:, :4], "encoder_hidden_states": states, "encoder_attention_mask": MASK}
    logits = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(["logits"], feeds)[0]
    with torch.no_grad():
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.from_numpy(states))
        mask, tokens = torch.from_numpy(MASK), torch.from_numpy(IDS[:, :4])
        expected = peft(decoder_input_ids=tokens, encoder_outputs=encoded, attention_mask=mask).logits.numpy()
    assert abs(logits - expected).max() <= 1e-5 * abs(expected).max()


def test_wrong_calls(tmp_path: Path) -> None:
    _, base, adapter = model("t5", tmp_path)
    both = fold(base, adapter, tmp_path / "out.onnx", "--task", f"{TASK}-with-past")
    assert both.exit_code == 2 or isinstance(both.exception, Exception)
    assert "--part encoder" in str(getattr(both.exception, "hint", ""))
    merged = fold(base, adapter, tmp_path / "merged", "--part", "decoder")
    assert "only its weights are read" in str(merged.exception)
    assert not (tmp_path / "out.onnx").exists() and not (tmp_path / "merged").exists()
