"""State dicts of loralib's own layers, folded and compared with loralib's forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from loracc.errors import BindingError, InputError, LoraccError
from loracc.formats import is_adapter, load_adapter
from loracc.inspection import inspect
from tests.formats.folding import folded_state, relative_error, save_base

ALPHA, RANK = 6, 2


class Block(nn.Module):
    """Every layer of loralib's but the two whose forward fails, or the same layers without it."""

    def __init__(self, *, lora: bool, enable: tuple[bool, ...] = (True, False, True)) -> None:
        super().__init__()
        options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "merge_weights": False} if lora else {}
        lib = loralib if lora else nn
        self.embed = lib.Embedding(20, 6, **options)
        merged: dict[str, Any] = {"enable_lora": list(enable)} if lora else {}
        self.qkv = (loralib.MergedLinear if lora else nn.Linear)(6, 18, **options, **merged)
        self.fc = lib.Linear(18, 18, **options)
        self.conv = lib.Conv2d(2, 3, 3, padding=1, **({"r": RANK, "lora_alpha": ALPHA} if lora else {}))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` is ``[batch, n]``."""
        hidden = torch.tanh(self.fc(self.qkv(self.embed(ids))))
        result: torch.Tensor = self.conv(hidden.reshape(ids.shape[0], 2, ids.shape[1], 9))
        return result


IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))


def trained(enable: tuple[bool, ...]) -> Block:
    torch.manual_seed(0)
    model = Block(lora=True, enable=enable).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def base_of(model: Block) -> Block:
    plain = Block(lora=False).double()
    plain.load_state_dict(
        {k.replace("conv.conv.", "conv."): v for k, v in model.state_dict().items() if "lora_" not in k}
    )
    return plain


@pytest.mark.parametrize("enable", [(True, False, True), (False, True, False), (True, True, True)])
def test_folded_as_loralib_computes_it(tmp_path: Path, enable: tuple[bool, ...]) -> None:
    model = trained(enable)
    path = tmp_path / "lora.pt"
    torch.save(loralib.lora_state_dict(model), path)
    plain = base_of(model)
    settled = {} if all(enable) else {"enable_lora": enable}
    with torch.no_grad():
        expected = model(IDS)
        before = plain(IDS)
        plain.load_state_dict(folded_state(save_base(plain, tmp_path), path, alpha=ALPHA, **settled))
        got = plain(IDS)
    assert relative_error(before, expected) > 1e-2
    assert relative_error(got, expected) < 1e-12


def test_a_weight_stored_turned_is_changed_turned(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = loralib.MergedLinear(
                6, 18, r=2, lora_alpha=6, enable_lora=[True, False, True], fan_in_fan_out=True
            )
            self.fc = loralib.Linear(6, 10, r=2, lora_alpha=6, fan_in_fan_out=True)

    torch.manual_seed(0)
    model = Turned().double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    path, base = tmp_path / "lora.pt", nn.Module()
    torch.save(loralib.lora_state_dict(model), path)
    for name in ("qkv", "fc"):
        layer = nn.Module()
        layer.weight = nn.Parameter(getattr(model, name).weight.detach().clone().contiguous())
        base.add_module(name, layer)
    after = folded_state(save_base(base, tmp_path), path, alpha=6, enable_lora=(True, False, True))
    model.eval()  # merges
    for name in ("qkv", "fc"):
        torch.testing.assert_close(after[f"{name}.weight"], getattr(model, name).weight, rtol=1e-12, atol=1e-12)


def test_trained_biases_replace_the_bases(tmp_path: Path) -> None:
    model = trained((True, True, True))
    plain = base_of(model)
    nn.init.ones_(model.fc.bias)
    path = tmp_path / "lora.pt"
    torch.save({k: v for k, v in loralib.lora_state_dict(model, bias="lora_only").items() if "fc" in k}, path)
    after = folded_state(save_base(plain, tmp_path), path, alpha=ALPHA)
    assert torch.equal(after["fc.bias"], torch.ones(18, dtype=torch.float64))


def saved(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    path = tmp_path / "lora.pt"
    torch.save({key.replace("__", "."): tensor for key, tensor in tensors.items()}, path)
    return path


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, fc__lora_A=torch.ones(2, 18), fc__lora_B=torch.ones(18, 2))
    with pytest.raises(InputError, match="--alpha"):
        load_adapter(path)
    assert [entry.delta.scale for entry in load_adapter(path, scale=0.5).entries] == [0.5]
    assert load_adapter(path, describe=True).format == "loralib"


def test_parts_that_are_switched_on_are_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, qkv__lora_A=torch.ones(4, 6), qkv__lora_B=torch.ones(12, 2))
    base = save_base(Block(lora=False), tmp_path)
    with pytest.raises(BindingError, match=r"--enable-lora 1,1,0"):
        folded_state(base, path, alpha=1)
    with pytest.raises(BindingError, match="switches 1 of 3 parts on"):
        folded_state(base, path, alpha=1, enable_lora=(True, False, False))
    after = folded_state(base, path, alpha=2, enable_lora=(False, True, True))
    changed = (after["qkv.weight"] != Block(lora=False).state_dict()["qkv.weight"]).any(dim=1)
    assert changed.tolist()[6:] == [True] * 12


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc__lora_A": torch.ones(2, 18)}, "pairs"),
        ({"fc__lora_A": torch.ones(2, 18), "fc__lora_B": torch.ones(18, 3)}, "not a pair"),
        ({"fc__lora_A": torch.ones(2, 18), "fc__lora_B": torch.ones(18)}, "not a pair"),
        (
            {"fc__lora_A": torch.ones(2, 18), "fc__lora_B": torch.ones(18, 2), "fc__weight": torch.ones(2)},
            "whole model",
        ),
        ({"fc__lora_A": torch.ones(0, 18), "fc__lora_B": torch.ones(18, 0)}, "empty"),
    ],
)
def test_wrong_files(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(LoraccError, match=message):
        load_adapter(saved(tmp_path, **tensors), alpha=4)


def test_loralibs_own_conv1d_is_refused_with_the_reason(tmp_path: Path) -> None:
    layer = loralib.Conv1d(4, 6, 3, r=2, lora_alpha=4)
    path, base = tmp_path / "lora.pt", nn.Module()
    base.add_module("conv", nn.Conv1d(4, 6, 3))
    torch.save({f"conv.{k}": v for k, v in loralib.lora_state_dict(layer).items()}, path)
    with pytest.raises(BindingError, match="Conv1d and Conv3d"):
        folded_state(save_base(base, tmp_path), path, alpha=4)


def test_inspect_tells_a_state_dict_of_factors_from_a_model(tmp_path: Path) -> None:
    path = saved(tmp_path, fc__lora_A=torch.ones(2, 18), fc__lora_B=torch.ones(18, 2))
    assert is_adapter(path)
    found = inspect(path)
    assert (found["kind"], found["format"], found["ranks"]) == ("adapter", "loralib", [2])
    torch.save({"fc.weight": torch.ones(2, 2), "fc.lora_A": torch.ones(1, 2), "fc.lora_B": torch.ones(2, 1)}, path)
    assert not is_adapter(path)
