"""A tiny Llama with a tokenizer of its own, and what onnxruntime-genai's model builder makes of it; all offline."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

__all__ = ["build_with_genai", "generate", "logits", "save_tokenizer", "tiny_llama"]

WORDS = 200


def tiny_llama(*, tied: bool = False, seed: int = 0, dtype: str = "float32") -> Any:
    """Random weights, grouped-query attention, a head size that the builder takes."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name:
                parameter.mul_(4)  # transformers' 0.02 leaves a random model that repeats one token
    return model.to(getattr(torch, dtype)).eval()


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of made-up words."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, WORDS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapper: Any = transformers.PreTrainedTokenizerFast  # untyped
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    wrapper(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def build_with_genai(folder: Path, out: Path, precision: str, **extra: object) -> Path:
    """``onnxruntime_genai.models.builder`` on a Hugging Face folder, for the CPU."""
    from onnxruntime_genai.models import builder

    options = [f"{key}={value}" for key, value in extra.items()]
    common = ("", str(folder), str(out), precision, "cpu", str(out / "cache"))
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        builder.create_model(*common, **builder.parse_extra_options(*common, options))
    return out / "model.onnx"


def logits(model: Path, tokens: list[int]) -> Any:
    """What a graph of the builder gives for a first call, in ONNX Runtime."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
    }
    empty = np.zeros((1, 2, 0, 16), np.float32)
    feeds |= {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    return session.run(["logits"], feeds)[0]


def generate(folder: Path, prompt: list[int], length: int, *, adapter: Path | None = None) -> list[int]:
    """Greedy tokens by onnxruntime-genai, the prompt among them; with an adapter active, if one is given."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "given")
        generator.set_active_adapter(adapters, "given")
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]
