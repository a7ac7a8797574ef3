"""kohya files: names that cannot be read backwards, alpha as a tensor, several models in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from loracc.deltas import LowRank
from loracc.errors import BindingError, InputError, LoraccError, NumericsError
from loracc.formats import load_adapter
from tests.formats.folding import TinyBlock, folded_with, relative_error

MODULES = {"down_blocks_0": (4, 6, 3), "down_blocks_1": (6, 6, 1), "mid_to_q": (6, 10, 0), "mid_proj_out": (10, 10, 0)}
RANK = 2
X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tensors(alpha: float | None = 3.0, prefix: str = "lora_unet_") -> dict[str, torch.Tensor]:
    """What sd-scripts' ``LoRAModule.state_dict`` holds: convolutions keep their kernel in lora_down."""
    torch.manual_seed(1)
    found: dict[str, torch.Tensor] = {}
    for name, (n_in, n_out, kernel) in MODULES.items():
        square = (kernel, kernel) if kernel else ()
        found[f"{prefix}{name}.lora_down.weight"] = torch.randn(RANK, n_in, *square)
        found[f"{prefix}{name}.lora_up.weight"] = torch.randn(n_out, RANK, *((1, 1) if kernel else ()))
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def with_branches(base: nn.Module, state: dict[str, torch.Tensor], scale: float) -> nn.Module:
    """sd-scripts' own forward: ``org(x) + lora_up(lora_down(x)) * multiplier * scale``."""
    for name, module in base.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.lora_down.weight" not in state:
            continue
        down, up = (state[f"{key}.lora_{part}.weight"].double() for part in ("down", "up"))

        def hook(layer: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor, down=down, up=up) -> torch.Tensor:  # type: ignore[no-untyped-def]
            if down.ndim == 4:
                assert isinstance(layer, nn.Conv2d)
                return out + F.conv2d(F.conv2d(args[0], down, padding=layer.padding), up) * scale
            return out + F.linear(F.linear(args[0], down), up) * scale

        module.register_forward_hook(hook)
    return base.eval()


@pytest.mark.parametrize(("alpha", "scale"), [(3.0, 1.5), (None, 1.0), (0.0, 1.0)])
def test_folded_as_sd_scripts_computes_it(tmp_path: Path, alpha: float | None, scale: float) -> None:
    path = tmp_path / "kohya.safetensors"
    save_file(tensors(alpha), path)
    with torch.no_grad():
        expected = with_branches(TinyBlock().double(), tensors(alpha), scale)(X)
        got = folded_with(TinyBlock().double(), path, tmp_path)(X)
        assert relative_error(TinyBlock().double()(X), expected) > 1e-2
    assert relative_error(got, expected) < 1e-12


def test_an_integer_alpha_and_a_flat_one_are_numbers(tmp_path: Path) -> None:
    state = tensors()
    state["lora_unet_mid_to_q.alpha"] = torch.tensor(4, dtype=torch.int64)
    state["lora_unet_mid_proj_out.alpha"] = torch.tensor([8.0], dtype=torch.float16)
    save_file(state, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert adapter.format == "kohya"
    scales = {entry.module: entry.delta.scale for entry in adapter.entries}
    assert scales == {"down_blocks_0": 1.5, "down_blocks_1": 1.5, "mid_to_q": 2.0, "mid_proj_out": 4.0}


def test_names_are_found_behind_a_wrapper_of_either_side(tmp_path: Path) -> None:
    save_file(tensors(prefix="lora_unet_model_"), tmp_path / "longer.safetensors")
    save_file(tensors(), tmp_path / "exact.safetensors")
    wrapped = nn.ModuleDict({"unet_model": TinyBlock()})
    plain = folded_with(TinyBlock(), tmp_path / "exact.safetensors", tmp_path).state_dict()
    shorter = folded_with(TinyBlock(), tmp_path / "longer.safetensors", tmp_path).state_dict()
    longer = folded_with(wrapped, tmp_path / "exact.safetensors", tmp_path).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(tensor, shorter[name])
        assert torch.equal(tensor, longer[f"unet_model.{name}"])


def test_a_name_that_two_modules_are_spelled_as_is_refused_and_can_be_mapped(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    state = {
        "lora_unet_a_b.lora_down.weight": torch.ones(1, 4),
        "lora_unet_a_b.lora_up.weight": torch.ones(4, 1),
        "lora_unet_a_b.alpha": torch.tensor(1.0),
    }
    path = tmp_path / "twins.safetensors"
    save_file(state, path)
    base = Twins()
    with pytest.raises(BindingError, match=r"a_b is (a_b or a\.b|a\.b or a_b)"):
        folded_with(base, path, tmp_path)
    mapped = folded_with(base, path, tmp_path, maps=["a_b=a.b"]).state_dict()
    before = base.state_dict()
    assert torch.equal(mapped["a_b.weight"], before["a_b.weight"])
    assert torch.equal(mapped["a.b.weight"], before["a.b.weight"] + 1)


def test_an_unknown_name_is_listed_with_its_nearest(tmp_path: Path) -> None:
    state = {key.replace("mid_to_q", "mid_to_k"): tensor for key, tensor in tensors().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(BindingError, match="mid_to_k"):
        folded_with(TinyBlock(), tmp_path / "a.safetensors", tmp_path)


def test_a_file_for_several_models_asks_which(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.safetensors"
    save_file(tensors() | tensors(prefix="lora_te1_") | tensors(prefix="lora_te2_"), path)
    with pytest.raises(InputError, match=r"3 models of a pipeline: text_encoder, text_encoder_2, unet"):
        load_adapter(path)
    with pytest.raises(InputError, match="--component vae"):
        load_adapter(path, component="vae")
    adapter = load_adapter(path, component="unet")
    assert {entry.module for entry in adapter.entries} == set(MODULES)
    assert adapter.notes == ("deltas for text_encoder, text_encoder_2 were left out (--component unet).",)
    looked_at = load_adapter(path, describe=True)
    assert len({entry.module for entry in looked_at.entries}) == 12


def test_the_users_alpha_counts_only_where_the_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(None), path)
    assert {entry.delta.scale for entry in load_adapter(path, alpha=8).entries} == {4.0}
    assert {entry.delta.scale for entry in load_adapter(path, scale=0.25).entries} == {0.25}
    save_file(tensors(3.0), path)
    adapter = load_adapter(path, alpha=8)
    assert {entry.delta.scale for entry in adapter.entries} == {1.5}
    assert "not used" in adapter.notes[0]


DOWN, UP = "lora_unet_mid_to_q.lora_down.weight", "lora_unet_mid_to_q.lora_up.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({UP: None}, InputError, "lora_up|not part"),
        ({DOWN: torch.ones(3, 6)}, InputError, "not a pair"),
        ({DOWN: torch.ones(6)}, InputError, "two axes"),
        ({DOWN: torch.ones(0, 6), UP: torch.ones(10, 0)}, InputError, "empty"),
        ({DOWN: torch.full((2, 6), np.inf)}, NumericsError, "inf or NaN"),
        ({DOWN: torch.ones(2, 6, dtype=torch.int8)}, InputError, "not of a float dtype"),
        ({"lora_unet_mid_to_q.alpha": torch.ones(2)}, InputError, "one number"),
        ({"lora_unet_mid_to_q.extra": torch.ones(2)}, InputError, "lora_unet_mid_to_q.extra"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, InputError, "mix files of two formats"),
    ],
)
def test_wrong_files(
    tmp_path: Path, change: dict[str, torch.Tensor | None], error: type[LoraccError], message: str
) -> None:
    state = {key: tensor for key, tensor in (tensors() | change).items() if tensor is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_a_plain_module_is_a_low_rank_delta(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    assert all(isinstance(entry.delta, LowRank) for entry in load_adapter(tmp_path / "a.safetensors").entries)
