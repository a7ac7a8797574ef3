"""Models and adapters of real shapes with random numbers, to be folded against the clock.

Nothing is downloaded. ``python -m tests.benchmarks.workloads llama-1b FOLDER`` makes
``FOLDER/base`` and ``FOLDER/adapter``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.streaming import OutputFile, Segment, write_files
from loracc.targets.checkpoint import safetensors_header
from loracc.tensors import TiledTensor

__all__ = ["WORKLOADS", "Workload", "export_base", "make", "make_adapter"]

BF16, FP16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Workload:
    """One model with its adapter.

    Attributes:
        config: The model's ``config.json``.
        dtype: Of the weights.
        targets: Names of the adapted layers.
        rank: Of the adapter; alpha is twice that.
        fan_in_fan_out: The adapted weights are stored as ``[in, out]``.
        sparse: The weights are holes in the file: nothing is on the disk, reads give zeros.
        shards: How many files the weights are in.
        factors: Dtype of the adapter.
    """

    config: Mapping[str, object]
    dtype: ir.DataType
    targets: tuple[str, ...]
    rank: int = 16
    fan_in_fan_out: bool = False
    sparse: bool = False
    shards: int = 1
    factors: ir.DataType = ir.DataType.FLOAT


def _llama(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int = 32000
) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


_GPT2: dict[str, object] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "dtype": "float32",
}

#: The largest model of the GPT-3 paper, in the layout that transformers has for decoders with separate q and v.
_GPT3: dict[str, object] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "num_hidden_layers": 96,
    "hidden_size": 12288,
    "ffn_dim": 49152,
    "num_attention_heads": 96,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 12288,
    "tie_word_embeddings": True,
    "dtype": "float16",
}

_LINEARS = ("c_attn", "c_fc", "mlp.c_proj", "attn.c_proj")

WORKLOADS = {
    "tiny": Workload(_llama(2, 256, 512, 4, 2, 1000), BF16, LLAMA_TARGETS),
    "gpt2-124m": Workload(_GPT2, FP32, _LINEARS, fan_in_fan_out=True),
    "gpt2-5m": Workload(
        {**_GPT2, "n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8000}, FP32, _LINEARS, fan_in_fan_out=True
    ),
    "gpt2-tiny": Workload(
        {**_GPT2, "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000}, FP32, _LINEARS, fan_in_fan_out=True
    ),
    "llama-1b": Workload(_llama(22, 2048, 5632, 32, 4), BF16, LLAMA_TARGETS),
    "gpt3-175b-sparse": Workload(_GPT3, FP16, ("q_proj", "v_proj"), rank=4, sparse=True, shards=36, factors=FP16),
    "llama-7b-sparse": Workload(_llama(32, 4096, 11008, 32, 32), BF16, LLAMA_TARGETS, sparse=True),
}


def make(name: str, folder: Path) -> None:
    """Write ``base`` and ``adapter`` of a workload into ``folder``; the same bytes every time."""
    work = WORKLOADS[name]
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(work.config, indent=2))
    tensors = {
        key: Noise(work.dtype, shape, key, 1.0 if len(shape) == 1 else 0.02) for key, shape in _shapes(work).items()
    }
    if work.shards == 1:
        _save(base / "model.safetensors", tensors, sparse=work.sparse)
    else:
        _save_shards(base, tensors, work)
    make_adapter(name, folder / "adapter")


def export_base(name: str, path: Path) -> Path:
    """Write a workload's base as ONNX with a data file beside it."""
    from loracc.model import LoadOptions
    from loracc.sites import write_records
    from loracc.sources import load_model
    from loracc.targets.onnx_file import write_onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        make(name, Path(folder))
        model = load_model(Path(folder) / "base", LoadOptions())
        write_records(model.ir, [site for site in model.sites if site.module])
        write_onnx(model.ir, path, external="data")
    return path


def make_adapter(
    name: str, folder: Path, *, targets: tuple[str, ...] = (), rank: int | None = None, seed: str = ""
) -> Path:
    """Write one adapter for a workload's base, on its own targets and of its own rank unless others are named."""
    work = WORKLOADS[name]
    targets, rank = targets or work.targets, rank or work.rank
    folder.mkdir(parents=True)
    factors: dict[str, Noise] = {}
    for key, shape in _shapes(work).items():
        module = key.removesuffix(".weight")
        if len(shape) == 2 and module.endswith(targets):
            rows, columns = reversed(shape) if work.fan_in_fan_out else shape
            for role, factor in (("A", (rank, columns)), ("B", (rows, rank))):
                name_ = f"base_model.model.{module}.lora_{role}.weight"
                factors[name_] = Noise(work.factors, factor, name_, 0.01, seed)
    _save(folder / "adapter_model.safetensors", factors)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "base",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": list(targets),
                "fan_in_fan_out": work.fan_in_fan_out,
                "bias": "none",
                "inference_mode": True,
            },
            indent=2,
        )
    )
    return folder


class Noise(TiledTensor):
    """Normally distributed numbers, seeded by the tensor's name and row, and by ``seed``."""

    def __init__(self, dtype: ir.DataType, shape: tuple[int, ...], name: str, deviation: float, seed: str = "") -> None:
        super().__init__(dtype, shape, name)
        self._deviation = deviation
        self._seed = f"{name}{seed}"

    def compute_rows(self, lo: int, hi: int) -> Array:
        rng = np.random.default_rng([lo, *self._seed.encode()])
        shape = (hi - lo, *(int(n) for n in self.shape.numpy()[1:]))
        return (rng.standard_normal(shape, np.float32) * np.float32(self._deviation)).astype(self.dtype.numpy())


def _save(path: Path, tensors: Mapping[str, Noise], *, sparse: bool = False) -> None:
    header, offsets = safetensors_header(tensors, {"format": "pt"})
    segments = tuple(Segment(len(header) + offsets[name], tensor) for name, tensor in tensors.items())
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    write_files([OutputFile(path, size, () if sparse else segments, header)])


def _save_shards(folder: Path, tensors: Mapping[str, Noise], work: Workload) -> None:
    """As transformers names them; each shard takes the next tensors."""
    names, weight_map = list(tensors), {}
    step = -(-len(names) // work.shards)
    for index in range(work.shards):
        part = {name: tensors[name] for name in names[index * step : (index + 1) * step]}
        file = f"model-{index + 1:05}-of-{work.shards:05}.safetensors"
        _save(folder / file, part, sparse=work.sparse)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def _shapes(work: Workload) -> dict[str, tuple[int, ...]]:
    kinds = {"gpt2": _gpt2_shapes, "llama": _llama_shapes, "opt": _opt_shapes}
    return kinds[str(work.config["model_type"])](work.config)


def _opt_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    hidden, inner = _number(config, "hidden_size"), _number(config, "ffn_dim")
    decoder = "model.decoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{decoder}.embed_tokens.weight": (_number(config, "vocab_size"), hidden),
        f"{decoder}.embed_positions.weight": (_number(config, "max_position_embeddings") + 2, hidden),
    }
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "v", "q", "out")}
    linears |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    for layer in range(_number(config, "num_hidden_layers")):
        prefix = f"{decoder}.layers.{layer}"
        for name, shape in linears.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{prefix}.{norm}.weight": (hidden,), f"{prefix}.{norm}.bias": (hidden,)}
    norm = f"{decoder}.final_layer_norm"
    return shapes | {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}


def _llama_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = (_number(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden // _number(config, "num_attention_heads") * _number(config, "num_key_value_heads")
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocabulary, hidden)}
    shapes["model.embed_tokens.weight"] = (vocabulary, hidden)
    for layer in range(_number(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def _gpt2_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    width = _number(config, "n_embd")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(_number(config, "n_layer")):
        prefix = f"transformer.h.{layer}"
        for name, columns in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            shapes[f"{prefix}.{name}.weight"] = (width, columns * width)
            shapes[f"{prefix}.{name}.bias"] = (columns * width,)
        shapes[f"{prefix}.mlp.c_proj.weight"] = (4 * width, width)
        shapes[f"{prefix}.mlp.c_proj.bias"] = (width,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}.{norm}.weight": (width,), f"{prefix}.{norm}.bias": (width,)}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    positions = (_number(config, "n_positions"), width)
    return shapes | {
        "transformer.wpe.weight": positions,
        "transformer.wte.weight": (_number(config, "vocab_size"), width),
    }


def _number(config: Mapping[str, object], key: str) -> int:
    value = config[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}")
    return value


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
