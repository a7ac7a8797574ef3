"""torchtune's files by its own rules (0.6.1 ``modules/peft/lora.py`` and ``dora.py``: its package needs torchao)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.formats import load_adapter
from tests.formats.folding import folded_state, relative_error, save_base

RANK, ALPHA = 2, 6.0


def base(*, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(6, 10, bias=bias), "w1": nn.Linear(6, 6, bias=bias)}).double()


def adapter(path: Path, *, dora: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = {}
    for name, out in (("q_proj", 10), ("w1", 6)):
        state[f"{name}.lora_a.weight"] = torch.randn(RANK, 6)
        state[f"{name}.lora_b.weight"] = torch.randn(out, RANK)
        if dora:
            state[f"{name}.magnitude"] = torch.rand(out) + 0.5
    torch.save(state, path)
    return {key: tensor.double() for key, tensor in state.items()}


def forward(layer: nn.Linear, state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """``LoRALinear.forward`` and ``DoRALinear.forward``."""
    a, b = state[f"{name}.lora_a.weight"], state[f"{name}.lora_b.weight"]
    base_out, scaling = F.linear(x, layer.weight, layer.bias), ALPHA / RANK
    lora_out = F.linear(F.linear(x, a), b)
    if f"{name}.magnitude" not in state:
        return base_out + scaling * lora_out
    norm = torch.linalg.norm(layer.weight + scaling * (b @ a), dim=1)
    ratio = (state[f"{name}.magnitude"] / norm).view(1, -1)
    return (ratio - 1) * base_out + ratio * lora_out * scaling + base_out


@pytest.mark.parametrize("dora", [False, True])
def test_folded_as_torchtune_computes_it(tmp_path: Path, dora: bool) -> None:
    path, plain = tmp_path / "adapter_0.pt", base(bias=not dora)
    state = adapter(path, dora=dora)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = {name: forward(plain[name], state, name, x) for name in ("q_proj", "w1")}  # type: ignore[index]
        before = {name: plain[name](x) for name in expected}  # type: ignore[index]
        plain.load_state_dict(folded_state(save_base(plain, tmp_path), path, alpha=ALPHA))
        for name, value in expected.items():
            assert relative_error(before[name], value) > 1e-2
            assert relative_error(plain[name](x), value) < 1e-12  # type: ignore[index]
    assert load_adapter(path, alpha=ALPHA).format == "torchtune"


def test_a_bias_beside_dora_is_refused_with_the_reason(tmp_path: Path) -> None:
    adapter(tmp_path / "a.pt", dora=True)
    with pytest.raises(UnsupportedError, match="bias by magnitude/norm"):
        folded_state(save_base(base(bias=True), tmp_path), tmp_path / "a.pt", alpha=ALPHA)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_a.weight": torch.ones(2, 6)}, "pairs"),
        ({"q.lora_a.weight": torch.ones(2, 6), "q.lora_b.weight": torch.ones(6, 3)}, "no pair"),
        ({"q.lora_a.weight": torch.ones(2, 6), "q.lora_b.weight": torch.ones(6, 2), "q.x": torch.ones(2)}, r"q\.x"),
        (
            {"q.lora_a.weight": torch.ones(2, 6), "q.lora_b.weight": torch.ones(6, 2), "q.magnitude": torch.ones(5)},
            "expected",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(LoraccError, match=message):
        load_adapter(tmp_path / "a.pt", alpha=1.0)


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    adapter(tmp_path / "a.pt", dora=False)
    with pytest.raises(InputError, match="recipe"):
        load_adapter(tmp_path / "a.pt")
