"""Time and memory of calibrated rounding: MiniLM, and a layer of a 1.1B model (TinyLlama's shapes).

A layer is timed as a model of one layer with a small vocabulary and random weights: what it costs depends on shapes and
on the number of tokens alone. Each figure is the command line in a process of its own, with ``--no-verify``, so that
rounding is what is timed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.calibrated_tables import minilm_case

__all__ = ["cost_rows"]

_LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
_VOCABULARY, _SAMPLES, _TOKENS = 512, 128, 128
#: Runs a command and prints its seconds, its processor's, and its largest resident set in kB.
_METER = """import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(code)"""


def cost_rows(work: Path) -> Iterator[str]:
    """A row for each model: TinyLlama's layer."""
    yield "| model | weights | nearest | calibrated | more, for a million | memory nearest | calibrated |"
    yield f"|{'---|' * 7}"
    yield _row("MiniLM", *minilm_case(work), work)
    yield _row(f"a layer of 1.1B, {_SAMPLES * _TOKENS} tokens", *_layer(work), work)


def _row(name: str, base: Path, adapter: Path, data: Path, work: Path) -> str:
    out = work / "cost.onnx"
    near, chosen = (metered(base, adapter, out, *more) for more in ((), ("--calibrate", data)))
    weights = _weights(adapter)
    return (
        f"| {name} | {weights / 1e6:.1f} M | {near[0]:.1f} s | {chosen[0]:.1f} s | "
        f"{(chosen[0] - near[0]) / weights * 1e6:.2f} s | {near[2]:.2f} GB | {chosen[2]:.2f} GB |"
    )


def metered(base: Path, adapter: Path, out: Path, *options: object) -> tuple[float, float, float]:
    """Seconds, the processor's seconds, and gigabytes of the largest resident set."""
    call = [
        sys.executable,
        "-m",
        "loracc",
        "fold",
        base,
        adapter,
        "-o",
        out,
        "--force",
        "--json",
        "--no-verify",
        *options,
    ]
    meter = [sys.executable, "-c", _METER, *(str(part) for part in call)]
    found = subprocess.run(meter, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    return float(found[0]), float(found[1]), float(found[2]) / 1e6


def _weights(adapter: Path) -> int:
    """Elements of the weights that an adapter changes."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        shapes: dict[str, Any] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(
        shape[0] * shapes[name.replace("lora_B", "lora_A")][1] for name, shape in shapes.items() if "lora_B" in name
    )


def _layer(work: Path) -> tuple[Path, Path, Path]:
    """A folder, an adapter of all seven linear layers, and inputs."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base, adapter, data = work / "layer", work / "layer-adapter", work / "layer.npz"
    if not base.exists():
        torch.manual_seed(0)
        made: Any = transformers
        model = made.LlamaForCausalLM(made.LlamaConfig(vocab_size=_VOCABULARY, num_hidden_layers=1, **_LAYER))
        model.to(torch.bfloat16).save_pretrained(base)
        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model.float(), config).save_pretrained(str(adapter))
        rng = np.random.default_rng(0)
        ids = rng.integers(0, _VOCABULARY, (_SAMPLES, _TOKENS))
        np.savez(data, input_ids=ids, attention_mask=np.ones_like(ids))
    return base, adapter, data
