"""Tensors of PyTorch files that no model file holds, and archives that torch did not write."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from loracc.cli import run

quantize = cast("Callable[..., torch.Tensor]", torch.quantize_per_tensor)

#: how it is made, what is said of it
ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.ones(6, 2).to_sparse(), "'fc.lora_B' is sparse"),
    "meta": (lambda: torch.empty(6, 2, device="meta"), "'fc.lora_B' has no data"),
    "quantized": (lambda: quantize(torch.ones(6, 2), 0.1, 0, torch.qint8), "'fc.lora_B' is quantized"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("place", ["adapter", "trusted adapter", "model"])
def test_it_is_named(kind: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = ODD[kind]
    torch.save({"fc.lora_A": torch.ones(2, 8), "fc.lora_B": make()}, tmp_path / "lora.pt")
    torch.save({"fc.weight": torch.ones(6, 8), "fc.lora_B": make()}, tmp_path / "model.pt")
    save_file({"fc.weight": np.ones((6, 8), np.float32)}, tmp_path / "base.safetensors")
    save_file({"fc.lora_A": np.ones((2, 8)), "fc.lora_B": np.ones((6, 2))}, tmp_path / "a.safetensors")
    names = ["model.pt", "a.safetensors"] if place == "model" else ["base.safetensors", "lora.pt"]
    more = ["--allow-pickle"] if place == "trusted adapter" else []
    out = tmp_path / "out.safetensors"
    assert run(["fold", *(str(tmp_path / name) for name in names), "--alpha", "1", "-o", str(out), *more]) == 2
    assert words in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("place", ["model", "adapter"])
def test_a_compressed_archive_is_refused_before_it_is_unpacked(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fc.weight": torch.ones(6, 8)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    paths = [str(tmp_path / "m.pt")] if place == "model" else [str(tmp_path / name) for name in ("plain.pt", "m.pt")]
    command = ["inspect", *paths] if place == "model" else ["fold", *paths, "--alpha", "1", "-o", str(tmp_path / "out")]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "m.pt: plain/data.pkl in it is compressed" in error
