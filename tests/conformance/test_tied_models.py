"""GPT-2's tied head: adapters on the embedding, on the head, on both, and what follows the tie, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loracc
from tests.models import adapted, build, save_base

pytestmark = [
    # PEFT and transformers warn about what these models do on purpose: adapters on tied weights.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONV1D: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
ADAPTERS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["wte"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["wte", "lm_head"]},
    "both, tied": {**CONV1D, "target_modules": ["wte", "c_attn"], "ensure_weight_tying": True},
    "token rows": {**CONV1D, "trainable_token_indices": {"wte": [3, 5, 7]}},
    "saved": {**CONV1D, "modules_to_save": ["wte"]},
    "saved, tied": {**CONV1D, "modules_to_save": ["wte"], "ensure_weight_tying": True},
    # The head is an nn.Linear beside Conv1D layers: PEFT writes the flag of whichever it met last.
    "head among Conv1D": {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True},
}


def made(lora: dict[str, Any], folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(model class, token ids, what PEFT computes for them in float64)."""
    model = build("gpt2")
    save_base(model, folder / "base")
    wrapped = adapted(model, **lora)
    wrapped.save_pretrained(folder / "adapter")
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return type(model), ids, wrapped.double()(ids)[0]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_checkpoint(name: str, tmp_path: Path) -> None:
    model_class, ids, expected = made(ADAPTERS[name], tmp_path)
    result = loracc.fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    apart = {"embedding", "head", "both", "saved", "head among Conv1D"}
    assert [note for note in result.to_json()["notes"] if "is shared" in note and "lm_head.weight" in note] or (
        name not in apart
    )
    merged = model_class.from_pretrained(tmp_path / "merged").double().eval()
    with torch.no_grad():
        assert error(merged(ids)[0], expected) < 1e-6


@pytest.mark.parametrize("name", ["embedding", "head", "both, tied", "token rows"])
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    _, ids, expected = made(ADAPTERS[name], tmp_path)
    loracc.fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    fed = {value.name: inputs[value.name] for value in session.get_inputs()}
    assert error(torch.from_numpy(np.asarray(session.run(None, fed)[0])).double(), expected) < 1e-5


def test_a_weight_that_the_graph_shares_is_reported_when_it_is_unshared(tmp_path: Path) -> None:
    """Large tied weights are one initializer in the base's graph (small ones torch's exporter copies)."""
    import onnx
    import transformers

    config = transformers.GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    model: Any = transformers.GPT2LMHeadModel(config)
    save_base(model, tmp_path / "base")
    for name in ("wte", "c_attn"):
        adapted(model, target_modules=[name], fan_in_fan_out=name == "c_attn").save_pretrained(tmp_path / name)
        model = transformers.GPT2LMHeadModel(config)
    notes, graphs = {}, {}
    for name in ("wte", "c_attn"):
        out = tmp_path / f"{name}.onnx"
        notes[name] = loracc.fold(tmp_path / "base", [tmp_path / name], out).to_json()["notes"]
        graphs[name] = onnx.load(out).graph
    [said] = [note for note in notes["wte"] if "is shared" in note]
    assert "'transformer.wte.weight'" in said and "'lm_head.weight'" in said and "51,200 bytes more" in said
    assert notes["c_attn"] == []
    assert [n.op_type for n in graphs["wte"].node] == [n.op_type for n in graphs["c_attn"].node]
    assert len(graphs["wte"].initializer) == len(graphs["c_attn"].initializer) + 1
