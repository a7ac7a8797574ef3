"""Stacked experts whose B may be packed in two orders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loracc
from loracc.errors import InputError
from loracc.formats import load_adapter

E, R, IN, OUT = 3, 2, 4, 6


def adapter(folder: Path, *, unsloth: bool) -> Path:
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": R,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj"],
        "auto_mapping": {"unsloth_fixed": True} if unsloth else None,
    }
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.mlp.experts"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((R * E, IN)),
        f"{stem}.lora_B.weight": rng.standard_normal((OUT, R * E)),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["peft", "unsloth"])
def test_each_order_of_packing(tmp_path: Path, layout: str) -> None:
    path = adapter(tmp_path / "a", unsloth=True)
    base = {"mlp.experts.gate_up_proj": np.zeros((E, OUT, IN))}
    save_file(base, tmp_path / "base.safetensors")
    loracc.fold(tmp_path / "base.safetensors", [path], tmp_path / "out.safetensors", moe_layout=layout)
    after = load_file(tmp_path / "out.safetensors")["mlp.experts.gate_up_proj"]
    a, b = load_file(path / "adapter_model.safetensors").values()
    split = b.reshape(OUT, R, E) if layout == "peft" else b.reshape(OUT, E, R).transpose(0, 2, 1)
    np.testing.assert_allclose(after, np.einsum("ore,eri->eoi", split, a.reshape(E, R, IN)), rtol=1e-12)


def test_a_file_of_unsloths_asks_and_pefts_own_does_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--moe-layout"):
        load_adapter(adapter(tmp_path / "unsloth", unsloth=True))
    assert load_adapter(adapter(tmp_path / "peft", unsloth=False)).format == "peft"
