"""What folding into quantized weights costs: scheme × how much of ΔW survived × error of the outputs.

The reference is the float model with the delta folded in. Errors are ‖y − y_ref‖ / ‖y_ref‖ over all tokens:

* ``beside``: the quantized base with the delta left beside it, unrounded: what quantizing the base alone costs;
* ``folded``: the delta folded into what the codes mean;
* ``--base``: the delta folded into the original weights, which are then requantized.

Run: ``python -m tests.benchmarks.quantized_folds``
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from loracc import attach, fold
from tests.quantizing import SCHEMES, VOCABULARY, adapter, quantized

STRENGTHS = {"strong": 1.0, "weak": 0.05}


def run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": np.arange(VOCABULARY)})[0], np.float64)


def row(folder: Path, scheme: str, strength: str) -> str:
    base = quantized(folder, scheme)
    lora = adapter(folder / "lora", scale=STRENGTHS[strength])
    float_model = folder / "float.onnx"
    fold(float_model, [lora], folder / "reference.onnx")
    reference = run(folder / "reference.onnx")
    norm = np.linalg.norm(reference)

    def error(values: np.ndarray) -> float:
        return float(np.linalg.norm(values - reference) / norm)

    folded = fold(base, [lora], folder / "folded.onnx")
    again = fold(base, [lora], folder / "again.onnx", original=float_model)
    beside = error(run_beside(base, lora, folder))
    effect = error(run(base))
    shares = [np.mean([site["survived"] for site in result.sites]) for result in (folded, again)]
    errors = [error(run(folder / name)) for name in ("folded.onnx", "again.onnx")]
    return (
        f"| {scheme} | {strength} | {100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % | {effect:.3f} | {beside:.4f} | "
        f"{errors[0]:.4f} | {errors[1]:.4f} |"
    )


def run_beside(base: Path, lora: Path, folder: Path) -> np.ndarray:
    out = folder / "switchable.onnx"
    attach(base, [f"one={lora}"], out, verify=False)
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    feeds = dict(ort.AdapterFormat.read_adapter(str(folder / "one.onnx_adapter")).get_parameters())
    feeds["ids"] = ort.OrtValue.ortvalue_from_numpy(np.arange(VOCABULARY))
    return np.asarray(session.run_with_ort_values(None, feeds)[0].numpy(), np.float64)


def main() -> None:
    logging.disable(logging.INFO)
    print("| scheme | ΔW | survived | with --base | no ΔW | beside | folded | --base |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for scheme in SCHEMES:
        for strength in STRENGTHS:
            with tempfile.TemporaryDirectory() as folder:
                print(row(Path(folder), scheme, strength), flush=True)


if __name__ == "__main__":
    main()
