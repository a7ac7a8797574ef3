"""``loracc verify`` on what ``loracc fold`` wrote, as a user calls it: no false alarm after a fold that passed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loracc.cli import run
from tests.models import adapted

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers about each other, and torch's exporter


def saved(model: Any, folder: Path, **lora: Any) -> tuple[str, str]:
    model.eval().save_pretrained(folder / "base")
    adapted(model, **lora).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def test_a_program_of_a_folder_is_compared_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes))
    base, adapter = saved(bert, tmp_path, target_modules=["query"])
    out = str(tmp_path / "out.pt2")
    assert run(["fold", base, adapter, "-o", out, "--quiet"]) == 0
    assert run(["verify", base, out, "--adapter", adapter, "--quiet"]) == 0


def test_the_copy_of_the_base_beside_an_embeddings_lora_is_no_second_binding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    base, adapter = saved(llama, tmp_path, target_modules=["embed_tokens", "q_proj"])
    out = str(tmp_path / "out.onnx")
    assert run(["fold", base, adapter, "-o", out, "--quiet"]) == 0
    assert run(["verify", base, out, "--adapter", adapter, "--quiet"]) == 0
