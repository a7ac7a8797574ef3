"""Three styles of one model, served from one process: ``python -m samples.switching.main FOLDER``.

A small PyTorch model and three PEFT adapters (random numbers, made here) become a deployment: one graph, one data file,
and a small file an adapter. Threads then ask for whichever style their request needs. Every answer is compared with the
unmerged PEFT model's.
"""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import loracc
from loracc.runtime import Deployment

__all__ = ["main"]

STYLES = ("formal", "brief", "pirate")
FEATURES, HIDDEN = 64, 256


def build_model() -> Any:
    """The base: the same random numbers every time."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES)).eval()


def train(style: str, folder: Path) -> Any:
    """What a training team hands over: an adapter folder. Here it is random; the PEFT model is returned to compare."""
    import peft
    import torch

    model = peft.get_peft_model(build_model(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"]))
    torch.manual_seed(STYLES.index(style) + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / style)
    return model.eval()


def main(folder: Path) -> None:
    """Make the deployment, serve 300 requests from eight threads, and compare every answer."""
    import torch

    warnings.filterwarnings("ignore")  # PEFT has no model card to link to
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, FEATURES)
    torch.export.save(torch.export.export(build_model(), (example,), dynamic_shapes=({0: batch},)), folder / "base.pt2")
    peft_models = {style: train(style, folder) for style in STYLES}

    # loracc attach base.pt2 formal/ brief/ pirate/ --as variants -o served.onnx
    adapters = [folder / style for style in STYLES]
    loracc.attach(folder / "base.pt2", adapters, folder / "served.onnx", mode="variants")

    rng = np.random.default_rng(0)
    requests = [(STYLES[i % 3], rng.standard_normal((1 + i % 4, FEATURES)).astype(np.float32)) for i in range(300)]
    with Deployment(folder / "served.onnx", capacity=2) as deployment, ThreadPoolExecutor(8) as pool:
        name = deployment.session().get_inputs()[0].name
        answers = list(pool.map(lambda request: deployment.run(request[0], {name: request[1]}), requests))

    worst = 0.0
    for (style, x), answer in zip(requests, answers, strict=True):
        with torch.no_grad():
            expected = peft_models[style](torch.from_numpy(x)).numpy()
        (got,) = answer.values()
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    size = sum(file.stat().st_size for file in (folder / "served.onnx.variants").iterdir())
    print(f"{len(requests)} requests, {len(STYLES)} styles, largest relative error to unmerged PEFT {worst:.1e}")
    print(f"base weights {(folder / 'served.onnx.data').stat().st_size:,} bytes, all styles {size:,} bytes")
    if worst > 1e-5:
        raise SystemExit("an answer is wrong")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
