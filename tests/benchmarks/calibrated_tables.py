"""What calibrated rounding wins on models that were trained, through the command line: the tables of docs/rounding.md.

* MiniLM with the sample's adapter: it is scored by the retrieval that it was trained for, on modules it never saw.
* GPT-2 and Llama, small and trained here (:mod:`tests.benchmarks.tiny_language_models`), by the loss on held-out text.

Error is relative (L2) of the outputs on held-out text, without padding, against the unfused model: the base's own
numbers in float32 with the adapter's ΔW, of a quantized base what its codes mean, and with ``--base`` the original
float weights. Weights of 16 bits are run in float32, so that nothing but their rounding is measured; quantized graphs
are run as they are.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.lower import lower
from loracc.model import LoadOptions
from loracc.proof.graphs import in_reference
from loracc.runners.runner import OnnxRunner
from loracc.sources import load_model
from loracc.targets.onnx_file import write_onnx
from tests.benchmarks.tiny_language_models import adapter_folder, base_folder, held_out_text, training_text

__all__ = ["language_rows", "minilm_case", "minilm_rows"]

_ROWS, _LENGTH, _EVERY = 48, 96, 20
#: Less than this of the loss is noise on so little text.
_LOST = 5e-5


def fold(base: Path, adapter: Path, out: Path, *options: object) -> None:
    """``loracc fold``, verified."""
    call = [sys.executable, "-m", "loracc", "fold", base, adapter, "-o", out, "--force", "--quiet", *options]
    subprocess.run([str(part) for part in call], check=True)


def runner(path: Path, *, as_it_is: bool = False) -> OnnxRunner:
    """An ``.onnx`` in float32 with the weights that it has."""
    if as_it_is:
        return OnnxRunner(path)
    graph = in_reference(load_model(path, LoadOptions()).ir, (), ir.DataType.FLOAT).model
    assert isinstance(graph, ir.Model)
    return OnnxRunner(graph)


def relative(ours: Array, reference: Array) -> float:
    """‖ours − reference‖ / ‖reference‖."""
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(ours - wide) / np.linalg.norm(wide))


# -------------------------------------------------------------------------------------------------------------- MiniLM


def minilm_case(work: Path) -> tuple[Path, Path, Path]:
    """MiniLM in bfloat16, the sample's adapter, and text to calibrate with."""
    from samples.minilm.dataset import training_pairs
    from samples.minilm.main import ADAPTER
    from samples.minilm.weights import minilm_folder

    text, found = work / "minilm.txt", training_pairs()
    lines = [pair.query for pair in found]
    text.write_text("\n".join(lines), encoding="utf-8")
    base = _stored(minilm_folder(), work / "minilm-bf16", "bf16")
    return base, ADAPTER, text


def minilm_rows(work: Path) -> Iterator[str]:
    """A row for each dtype of the base."""
    from samples.minilm.dataset import held_out_pairs
    from samples.minilm.encoders import load_tokenizer
    from samples.minilm.evaluate import embed, mrr
    from samples.minilm.weights import minilm_folder

    (_, adapter, text), pairs = minilm_case(work), held_out_pairs()
    queries = [pair.query for pair in pairs]
    yield "| base → output | nearest | calibrated | times less | MRR unfused | nearest | calibrated |"
    yield f"|{'---|' * 7}"
    for stored, dtype in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16")):
        base = _stored(minilm_folder(), work / f"minilm-{stored}", stored)
        tokens = load_tokenizer(base)
        exact = work / "exact.onnx"
        fold(base, adapter, exact, "--dtype", "fp32")
        made = [work / f"minilm-{stored}-{dtype}-{name}.onnx" for name in ("nearest", "calibrated")]
        for out, more in zip(made, ((), ("--calibrate", text)), strict=True):
            fold(base, adapter, out, "--dtype", dtype, *more)
        encoders = [_encoder(path) for path in (exact, *made)]
        vectors = [embed(encoder, tokens, queries) for encoder in encoders]
        errors = [relative(ours, vectors[0]) for ours in vectors[1:]]
        scores = " | ".join(f"{mrr(encoder, tokens, pairs):.4f}" for encoder in encoders)
        yield (f"| {stored} → {dtype} | {errors[0]:.3g} | {errors[1]:.3g} | {errors[0] / errors[1]:.2f} | {scores} |")


def _encoder(path: Path) -> Callable[[Any], Any]:
    run = runner(path)
    return lambda batch: run.run(batch)["last_hidden_state"]


def _stored(folder: Path, copy: Path, dtype: str) -> Path:
    """A copy of a model's folder with its weights in another dtype."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    if not copy.exists():
        shutil.copytree(folder, copy)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        tensors = load_file(copy / "model.safetensors")
        changed = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "torch_dtype": str(kind).removeprefix("torch.")}))
    return copy


# ----------------------------------------------------------------------------------------------------- language models


def language_rows(kind: str, work: Path, *, steps: tuple[int, int]) -> Iterator[str]:
    """A row for each way to store the weights."""
    base = base_folder(kind, work / kind, steps=steps[0])
    adapter = adapter_folder(base, work / f"{kind}-adapter", steps=steps[1])
    text = work / "numpy.txt"
    text.write_text("\n".join(training_text()[::_EVERY]), encoding="utf-8")
    rows = _held_out(base)
    exact, plain = work / f"{kind}-exact.onnx", work / f"{kind}-float.onnx"
    fold(base, adapter, exact, "--dtype", "fp32")
    reference = _logits(runner(exact), rows)
    if not plain.exists():
        write_onnx(lower(load_model(base, LoadOptions(graph=True)), ir.DataType.FLOAT).ir, plain)
    alone, adapted = (_loss(values, rows) for values in (_logits(runner(plain), rows), reference))
    yield f"{kind}: perplexity of the base {np.exp(alone):.3f}, with the adapter, unfused, {np.exp(adapted):.3f}"
    yield ""
    yield "| weights | nearest | calibrated | times less | perplexity unfused | nearest | calibrated | loss won back |"
    yield f"|{'---|' * 8}"
    for name, source, options, beside in _ways(kind, base, plain, adapter, work):
        unfused = reference if beside is None else _logits(beside, rows)
        made = []
        for rounding, more in (
            ("nearest", ("--no-verify",)),
            ("calibrated", ("--calibrate", text, "--tokenizer", base)),
        ):
            out = work / f"{kind}-{rounding}.onnx"
            fold(source, adapter, out, *options, *more)
            made.append(_logits(runner(out, as_it_is=source is not base), rows))
        yield _row(name, unfused, made, rows)


def _row(name: str, unfused: Array, made: Sequence[Array], rows: Array) -> str:
    errors = [relative(values, unfused) for values in made]
    losses = [_loss(values, rows) for values in (unfused, *made)]
    lost = losses[1] - losses[0]
    won = f"{(losses[1] - losses[2]) / lost:.0%} of {lost:.2g}" if lost > _LOST else f"none lost ({lost:.2g})"
    shown = " | ".join(f"{error:.3g}" for error in errors)
    perplexities = " | ".join(f"{np.exp(loss):.3f}" for loss in losses)
    return f"| {name} | {shown} | {errors[0] / errors[1]:.2f} | {perplexities} | {won} |"


_Way = tuple[str, Path, tuple[object, ...], "Any"]


def _ways(kind: str, base: Path, plain: Path, adapter: Path, work: Path) -> Iterator[_Way]:
    """Name, what to fold into, options, and how the unfused model runs where it is not the reference."""
    yield "bf16", base, ("--dtype", "bf16"), None
    yield "fp16", base, ("--dtype", "fp16"), None
    for bits, form in ((8, "MatMulNBits"), (4, "MatMulNBits"), (4, "QDQ")):
        coded = _quantized(plain, work / f"{kind}-{form}-{bits}.onnx", form, bits)
        yield f"int{bits} {form}", coded, (), _Beside(coded, adapter, work)
        if bits == 4 and form == "MatMulNBits":
            yield f"int{bits} {form}, --base", coded, ("--base", plain), None


def _quantized(plain: Path, out: Path, form: str, bits: int) -> Path:
    """Blocks of 32, symmetric, by onnxruntime's own quantizer, which takes a MatMul but no Gemm (GPT-2's).

    The head stays in float: no delta changes it, and so no fold can make its error less.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    logging.disable(logging.INFO)
    if not out.exists():
        way = QuantFormat.QDQ if form == "QDQ" else QuantFormat.QOperator
        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits, quant_format=way)
        model = ONNXModel(onnx.load(plain))
        model.replace_gemm_with_matmul()
        head = [node.name for node in model.model.graph.node if any("lm_head" in name for name in node.input)]
        quantizer = MatMulNBitsQuantizer(model.model, algo_config=config, nodes_to_exclude=head)
        quantizer.process()
        onnx.save(quantizer.model.model, out)
    return out


class _Beside:
    """The adapter beside a quantized base's weights, unrounded, by ``loracc attach``."""

    def __init__(self, base: Path, adapter: Path, work: Path) -> None:
        import loracc

        out = work / "beside.onnx"
        loracc.attach(base, [f"one={adapter}"], out, verify=False, force=True)
        self._runner = OnnxRunner(out, adapter=work / "one.onnx_adapter")

    def run(self, inputs: Any) -> dict[str, Array]:
        """As a runner does."""
        return self._runner.run(inputs)


def _held_out(base: Path) -> Array:
    """Rows of ids of the text that nothing was fitted to."""
    from transformers import AutoTokenizer

    tokens: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    ids = [number for line in tokens(held_out_text())["input_ids"] for number in (*line, tokens.eos_token_id)]
    return np.array(ids[: _ROWS * _LENGTH]).reshape(_ROWS, _LENGTH)


def _logits(model: Any, rows: Array) -> Array:
    found = []
    for lo in range(0, len(rows), 8):
        ids = rows[lo : lo + 8]
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        values = model.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places})
        found.append(values["logits"].astype(np.float32))
    return np.concatenate(found)


def _loss(logits: Array, rows: Array) -> float:
    """Mean negative log-likelihood of each next token."""
    wide = logits[:, :-1].astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    normal = np.log(np.exp(wide - top).sum(axis=-1)) + top[..., 0]
    own = np.take_along_axis(wide, rows[:, 1:, None], axis=-1)[..., 0]
    return float((normal - own).mean())
