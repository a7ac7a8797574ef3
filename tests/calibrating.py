"""A model of two layers whose inputs are correlated, its adapter, and data to calibrate the rounding with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from loracc.dtypes import Array

__all__ = ["SIZES", "inputs", "write_adapter", "write_data", "write_model", "write_tokenizer"]

#: Features: in, hidden, out. (x·A is wide enough that the delta's strength is measured to a third of a percent.)
SIZES = (48, 64, 40)


def write_model(path: Path, *, seed: int = 0, gemm: bool = True) -> Path:
    """x·W0 stored ``[in, out]``, Relu, then a Gemm whose weight is stored ``[out, in]``, or a MatMul."""
    rng = np.random.default_rng(seed)
    one = rng.standard_normal(SIZES[:2]).astype(np.float32) / 7
    two = rng.standard_normal(SIZES[:0:-1]).astype(np.float32) / 8
    last = helper.make_node("Gemm", ["r", "two.weight"], ["y"], "/two/Gemm", transB=1)
    if not gemm:
        two, last = np.ascontiguousarray(two.T), helper.make_node("MatMul", ["r", "two.weight"], ["y"], "/two/MatMul")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "one.weight"], ["h"], "/one/MatMul"),
            helper.make_node("Relu", ["h"], ["r"], "/Relu"),
            last,
        ],
        "calibrated",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIZES[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", SIZES[2]])],
        [numpy_helper.from_array(one, "one.weight"), numpy_helper.from_array(two, "two.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def write_adapter(folder: Path, *, seed: int = 1, size: float = 0.1) -> Path:
    """PEFT's LoRA of rank 4 on both layers."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["one", "two"]})
    )
    tensors = {}
    for name, inside, outside in zip(("one", "two"), SIZES[:2], SIZES[1:], strict=True):
        for part, shape in (("A", (4, inside)), ("B", (outside, 4))):
            values = rng.standard_normal(shape).astype(np.float32) * np.float32(size)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def inputs(samples: int, *, seed: int, rank: int = 10) -> Array:
    """Rows in few directions and a little of all: as layers of real models see them."""
    mixing = np.random.default_rng(99).standard_normal((rank, SIZES[0]))
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((samples, rank)) @ mixing + 0.1 * rng.standard_normal((samples, SIZES[0]))
    return rows.astype(np.float32)


def write_data(path: Path, *, samples: int = 160, seed: int = 2) -> Path:
    """An ``.npz`` of rows."""
    np.savez(path, x=inputs(samples, seed=seed))
    return path


def write_tokenizer(folder: Path, *, words: int) -> None:
    """Of the words w0, w1, ..., beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{f"w{number}": number + 2 for number in range(words)}}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokens, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
