"""Files that diffusers' own saver writes, and its older generations' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loracc.errors import InputError, LoraccError
from loracc.formats import load_adapter
from tests.formats.folding import TinyBlock, folded_state, relative_error, save_base

# diffusers and its imports warn of what is deprecated in other packages while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

RANK = 4


def tiny_unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is installed without its dependencies, by hand")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=12,
        norm_num_groups=4,
    ).double()


def with_lora(unet: Any, **settings: Any) -> Any:
    from peft import LoraConfig

    targets = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]
    unet.add_adapter(LoraConfig(r=RANK, target_modules=targets, **settings))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2) if "magnitude" not in name else parameter.data.mul_(1.3)
    return unet.eval()


def save(unet: Any, folder: Path, *, metadata: bool) -> Path:
    """As diffusers' training scripts do."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(unet)
    described: dict[str, Any] = (
        {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()} if metadata else {}
    )
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **described)
    return folder / "pytorch_lora_weights.safetensors"


INPUTS = (torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([3]), torch.randn(1, 5, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "metadata"),
    [
        ({"lora_alpha": RANK}, False),
        ({"lora_alpha": 7}, True),
        ({"lora_alpha": 3, "use_dora": True}, True),
        ({"lora_alpha": 7, "use_rslora": True, "rank_pattern": {"to_v": 2}}, True),
    ],
)
def test_folded_as_diffusers_computes_it(tmp_path: Path, settings: dict[str, Any], metadata: bool) -> None:
    plain, tuned = tiny_unet(), with_lora(tiny_unet(), **settings)
    path = save(tuned, tmp_path, metadata=metadata)
    adapter = load_adapter(path)
    assert adapter.format == "diffusers"
    assert bool(adapter.notes) == (not metadata)
    with torch.no_grad():
        expected, before = tuned(*INPUTS).sample, plain(*INPUTS).sample
        plain.load_state_dict(folded_state(save_base(plain, tmp_path), path))
        assert relative_error(before, expected) > 1e-2
        assert relative_error(plain(*INPUTS).sample, expected) < 1e-10


GENERATIONS = {
    "peft": ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"),
    "adapter name": ("unet.mid.to_q.lora_A.default.weight", "unet.mid.to_q.lora_B.default.weight"),
    "lora": ("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight"),
    "linear layer": ("unet.mid.to_q.lora_linear_layer.down.weight", "unet.mid.to_q.lora_linear_layer.up.weight"),
    "processor": ("unet.mid.processor.to_q_lora.down.weight", "unet.mid.processor.to_q_lora.up.weight"),
    "no component": ("mid.processor.to_q_lora.down.weight", "mid.processor.to_q_lora.up.weight"),
}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_every_generation_of_names(tmp_path: Path, generation: str, alpha: float | None) -> None:
    down, up = GENERATIONS[generation]
    state = {down: torch.randn(2, 6), up: torch.randn(10, 2)}
    module = down.split(".processor")[0] + ".to_q" if "processor" in down else down.split(".lora")[0]
    if alpha is not None:
        state[f"{module}.alpha"] = torch.tensor(alpha)
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    base = TinyBlock()
    after = folded_state(save_base(base, tmp_path), path)["mid.to_q.weight"]
    scale = 1.0 if alpha is None else alpha / 2
    torch.testing.assert_close(after, base.state_dict()["mid.to_q.weight"] + scale * state[up] @ state[down])
    assert sorted(key for entry in load_adapter(path).entries for key in entry.keys) == sorted(state)


def test_text_encoders_old_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora"
    save_file({f"{stem}.down.weight": torch.ones(2, 6), f"{stem}.up.weight": torch.ones(6, 2)}, path)
    assert [entry.name for entry in load_adapter(path).entries] == [
        "text_model.encoder.layers.0.self_attn.out_proj.weight"
    ]


def test_a_file_for_several_models_asks_which_and_uses_that_ones_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state: dict[str, torch.Tensor] = {}
    for component in ("unet", "text_encoder"):
        state |= {f"{component}.mid.to_q.lora_A.weight": torch.ones(2, 6)}
        state |= {f"{component}.mid.to_q.lora_B.weight": torch.ones(10, 2)}
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 10}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(InputError, match="--component"):
        load_adapter(path)
    for component, scale in (("unet", 3.0), ("text_encoder", 5.0)):
        assert [entry.delta.scale for entry in load_adapter(path, component=component).entries] == [scale]


def test_gpt2s_own_transformer_prefix_is_not_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {
            "transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 6),
            "transformer.h.0.attn.c_attn.lora_B.weight": torch.ones(6, 2),
        },
        path,
    )
    with pytest.raises(InputError, match="--alpha"):
        load_adapter(path)
    assert load_adapter(path, alpha=2).format == "peft"


STEM = "unet.mid.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STEM}.lora_B.weight": None}, "pairs"),
        ({f"{STEM}.lora_B.weight": torch.ones(10, 3)}, "ranks 2 and 3"),
        ({f"{STEM}.other": torch.ones(2)}, r"unet\.mid\.to_q\.other"),
        ({f"{STEM}.alpha": torch.zeros(())}, "other than 0"),
        ({f"{STEM}.lora.down.weight": torch.ones(2, 6)}, "same tensor of one module"),
    ],
)
def test_wrong_files(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {f"{STEM}.lora_A.weight": torch.ones(2, 6), f"{STEM}.lora_B.weight": torch.ones(10, 2)} | change
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "a.safetensors")
    with pytest.raises(LoraccError, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_the_file_is_what_diffusers_reads_too(tmp_path: Path) -> None:
    """The fixture is the real thing: diffusers loads it back into the same tensors."""
    tuned = with_lora(tiny_unet(), lora_alpha=RANK)
    path = save(tuned, tmp_path, metadata=False)
    other = tiny_unet()
    other.load_lora_adapter(load_file(path), prefix="unet")
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(*INPUTS).sample, tuned(*INPUTS).sample, rtol=1e-6, atol=1e-6)
