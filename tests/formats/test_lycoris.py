"""Files written by LyCORIS itself, folded and compared with its forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loracc.adapter import PendingDelta
from loracc.errors import BindingError, InputError
from loracc.formats import load_adapter
from tests.formats.folding import TinyBlock, folded_with, relative_error

# LyCORIS warns of options that do not go together and of deprecated torch calls while it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))

#: Name -> arguments of ``create_lycoris``.
CASES: dict[str, dict[str, Any]] = {
    "locon": {"algo": "lora"},
    "locon tucker": {"algo": "lora", "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora in": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 2},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "ia3": {"algo": "ia3"},
    "glora": {"algo": "glora"},
}


def trained(base: nn.Module, path: Path, **arguments: Any) -> nn.Module:
    """``base`` with a LyCORIS network applied, its parameters random, saved by LyCORIS."""
    wrapper = pytest.importorskip("lycoris.wrapper", reason="lycoris-lora is installed without its dependencies")
    torch.manual_seed(5)
    wrapper.LycorisNetwork.apply_preset(
        {"target_module": ["TinyBlock"], "target_name": [], "module_algo_map": {}, "name_algo_map": {}}
    )
    network = wrapper.create_lycoris(base, 1.0, linear_dim=2, linear_alpha=3, **arguments)
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "dora" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif arguments["algo"] != "full":
            nn.init.normal_(parameter, mean=0.1, std=0.3)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_weights(str(path), torch.float32, {})
    return base.eval()


@pytest.mark.parametrize("case", CASES)
def test_folded_as_lycoris_computes_it(tmp_path: Path, case: str) -> None:
    path = tmp_path / "lycoris.safetensors"
    with torch.no_grad():
        expected = trained(TinyBlock(), path, **CASES[case])(X)
        assert load_adapter(path).format == ("kohya" if case == "locon" else "lycoris")
        got = folded_with(TinyBlock(), path, tmp_path, dora_axis="in" if case == "dora in" else "out")(X)
        assert relative_error(TinyBlock()(X), expected) > 1e-2, "the adapter does nothing"
    assert relative_error(got, expected) < 2e-4


def test_a_network_of_several_kinds_with_trained_norms_and_biases(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    trained(TinyBlock(), path, algo="loha")
    state = load_file(path)
    loha = {key: tensor for key, tensor in state.items() if "mid_to_q" in key}
    assert loha
    mixed = loha | {
        "lycoris_mid_norm.w_norm": torch.full((10,), 0.5),
        "lycoris_mid_norm.b_norm": torch.full((10,), 0.25),
        "lycoris_mid_to_q.diff_b": torch.ones(10),
        "lycoris_mid_proj_out.lora_up.weight": torch.ones(10, 1),
        "lycoris_mid_proj_out.lora_down.weight": torch.ones(1, 10),
        "lycoris_mid_proj_out.diff_b": torch.ones(10) * 2,
        "lycoris_down_blocks_1.diff": torch.ones(6, 6, 1, 1),
    }
    save_file(mixed, path)
    base = TinyBlock()
    after, before = folded_with(base, path, tmp_path).state_dict(), base.state_dict()
    torch.testing.assert_close(after["mid.norm.weight"], before["mid.norm.weight"] + 0.5)
    torch.testing.assert_close(after["mid.norm.bias"], before["mid.norm.bias"] + 0.25)
    torch.testing.assert_close(after["mid.to_q.bias"], before["mid.to_q.bias"] + 1)
    torch.testing.assert_close(after["mid.proj_out.bias"], before["mid.proj_out.bias"] + 2)
    torch.testing.assert_close(after["mid.proj_out.weight"], before["mid.proj_out.weight"] + 1)
    torch.testing.assert_close(after["down_blocks.1.weight"], before["down_blocks.1.weight"] + 1)
    assert not torch.equal(after["mid.to_q.weight"], before["mid.to_q.weight"])
    used = [key for entry in load_adapter(path).entries for key in entry.keys]
    assert sorted(used) == sorted(mixed), "every key is used exactly once"


def test_a_flat_magnitude_of_a_square_weight_asks_for_its_axis(tmp_path: Path) -> None:
    path = tmp_path / "flat.safetensors"
    state = {
        "lycoris_mid_proj_out.lora_up.weight": torch.ones(10, 1),
        "lycoris_mid_proj_out.lora_down.weight": torch.ones(1, 10),
        "lycoris_mid_proj_out.dora_scale": torch.linspace(0.5, 1.5, 10),
    }
    save_file(state, path)
    with pytest.raises(BindingError, match="--dora-axis"):
        folded_with(TinyBlock(), path, tmp_path)
    v = TinyBlock().state_dict()["mid.proj_out.weight"] + 1
    for axis, dim in (("out", 1), ("in", 0)):
        after = folded_with(TinyBlock(), path, tmp_path, dora_axis=axis).state_dict()["mid.proj_out.weight"]
        m = state["lycoris_mid_proj_out.dora_scale"]
        torch.testing.assert_close(after, v / v.norm(dim=dim, keepdim=True) * (m[:, None] if dim else m[None]))


def test_inspection_does_not_need_the_model(tmp_path: Path) -> None:
    from loracc.inspection import inspect

    path = tmp_path / "loha.safetensors"
    trained(TinyBlock(), path, algo="loha")
    assert all(isinstance(entry.delta, PendingDelta) for entry in load_adapter(path).entries)
    found = inspect(path)
    assert (found["kind"], found["format"], len(found["entries"])) == ("adapter", "lycoris", 4)


def test_a_module_without_its_other_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({"lycoris_mid_to_q.hada_w1_a": torch.ones(10, 2)}, path)
    with pytest.raises(InputError, match="w1_b"):
        load_adapter(path)
