"""Small language models that have learned something: GPT-2's and Llama's architectures, a few minutes of a CPU each.

Text is what every installation has. The base learns the standard library's docstrings, the adapter NumPy's; every tenth
of NumPy's is held out, and so nobody trains or calibrates on it. Everything is seeded; on one machine, with one number
of threads, the same weights come out.
"""

from __future__ import annotations

import ast
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracc.dtypes import Array

__all__ = ["KINDS", "adapter_folder", "base_folder", "held_out_text", "paragraphs", "training_text"]

KINDS = ("gpt2", "llama")
_VOCABULARY, _LAYERS, _WIDTH, _HEADS, _LENGTH, _BATCH = 4096, 4, 256, 4, 96, 16
_END = "<|end|>"
_LAYERS_OF = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def paragraphs(folder: Path, *, longest: int = 1000) -> list[str]:
    """The paragraphs of all docstrings below a folder, a line each, without repetitions, in the files' order."""
    return list(dict.fromkeys(_paragraphs(folder, longest)))


def _paragraphs(folder: Path, longest: int) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"} & set(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for part in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(part.split())
                    if len(text) > 40:
                        yield text[:longest]


def _numpy() -> list[str]:
    return paragraphs(Path(np.__file__).parent)


def training_text() -> list[str]:
    """NumPy's, what the adapter learns and calibration may see."""
    return [text for number, text in enumerate(_numpy()) if number % 10]


def held_out_text() -> list[str]:
    """NumPy's, every tenth."""
    return _numpy()[::10]


def base_folder(kind: str, folder: Path, *, steps: int) -> Path:
    """A Hugging Face folder with bfloat16 weights, from the standard library's docstrings; kept if it is there."""
    import torch

    if not folder.exists():
        text = paragraphs(Path(sysconfig.get_paths()["stdlib"]))
        tokens = _tokenizer(text)
        torch.manual_seed(0)
        model = _model(kind)
        _train(model, list(model.parameters()), _rows(tokens, text), steps, rate=2e-3)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokens.save_pretrained(folder)
    return folder


def adapter_folder(base: Path, folder: Path, *, steps: int, rank: int = 8) -> Path:
    """A PEFT adapter of every linear layer but the head, trained on NumPy's docstrings; kept if it is there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        turned = type(model).__name__.startswith("GPT2")
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=_LAYERS_OF["gpt2" if turned else "llama"],
            fan_in_fan_out=turned,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        rows = _rows(AutoTokenizer.from_pretrained(base, local_files_only=True), training_text())
        _train(model, [p for p in model.parameters() if p.requires_grad], rows, steps, rate=2e-3)
        model.save_pretrained(folder)
    return folder


def _tokenizer(text: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(text, trainer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokens, eos_token=_END, pad_token=_END, model_max_length=_LENGTH)


def _model(kind: str) -> Any:
    import transformers

    made: Any = transformers
    sizes = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 128}
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_layer": _LAYERS, "n_embd": _WIDTH, "n_head": _HEADS}
        return made.GPT2LMHeadModel(made.GPT2Config(**sizes, **shape, **dropout))
    heads = {"num_attention_heads": _HEADS, "num_key_value_heads": _HEADS // 2, "num_hidden_layers": _LAYERS}
    shape = {"hidden_size": _WIDTH, "intermediate_size": 704}
    return made.LlamaForCausalLM(made.LlamaConfig(**sizes, **heads, **shape))


def _rows(tokens: Any, text: Sequence[str]) -> Array:
    """All text as one stream of ids, cut into rows."""
    stream = [number for ids in tokens(list(text))["input_ids"] for number in (*ids, tokens.eos_token_id)]
    count = len(stream) // _LENGTH
    return np.array(stream[: count * _LENGTH]).reshape(count, _LENGTH)


def _train(model: Any, parameters: Sequence[Any], rows: Array, steps: int, *, rate: float) -> None:
    """AdamW, a warm-up and a cosine."""
    import torch

    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 20 * share) * 0.5 * (1 + math.cos(math.pi * share))
        batch = torch.from_numpy(rows[rng.integers(0, len(rows), _BATCH)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
