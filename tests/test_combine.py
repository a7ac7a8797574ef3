"""``--combine`` against PEFT's own ``add_weighted_adapter``, and DARE's masks by their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loracc
from loracc.adapter import Adapter, Delta, Entry
from loracc.cli import run
from loracc.combine import CombineOptions, combine_adapters
from loracc.combine_methods import METHODS
from loracc.deltas import Addition, DoRA, LowRank, Replacement
from loracc.errors import InputError, LoraccError, UnsupportedError
from tests.models import randomize

# PEFT says that a density of 1 prunes nothing, and that an adapter's name is already there.
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = (0.7, -0.4, 1.3)
IDS = torch.arange(30).reshape(3, 10)
FLOAT64 = np.dtype(np.float64)


class Net(nn.Module):
    """An embedding, a linear layer and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(30, 12)
        self.fc = nn.Linear(12, 16)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(self.wte(ids)))
        result: torch.Tensor = self.conv(torch.stack([x, x * x], dim=1))
        return result


@pytest.fixture(scope="module", params=["one rank", "several ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder with three adapters and the base, PEFT's model with the three)."""
    folder = tmp_path_factory.mktemp("combine")
    model: Any = None
    for index, (name, alpha) in enumerate((("a", 8), ("b", 3), ("c", 5))):
        rank = 4 if request.param == "one rank" else 2 + index
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["wte", "fc", "conv"])
        model = (
            peft.get_peft_model(Net(), config, name) if model is None else (model.add_adapter(name, config), model)[1]
        )
    randomize(model, seed=5, scale=0.4, names=lambda name: "lora_" in name)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    model.eval().save_pretrained(folder)
    save_file(Net().state_dict(), folder / "base.safetensors")
    return folder, model


def combined_by_peft(model: Any, method: str, density: float | None, rank: int | None) -> torch.Tensor:
    name = f"{method} of abc"
    peft_name = "dare_linear" if method == "dare" else method
    model.add_weighted_adapter(
        list("abc"), list(WEIGHTS), name, combination_type=peft_name, density=density, svd_rank=rank
    )
    model.set_adapter(name)
    with torch.no_grad():
        result: torch.Tensor = model(IDS)
    return result


def folded(folder: Path, out: Path, *options: str) -> torch.Tensor:
    adapters = [f"{folder / name}@{weight}" for name, weight in zip("abc", WEIGHTS, strict=True)]
    assert (
        run(["fold", str(folder / "base.safetensors"), *adapters, "-o", str(out), "--quiet", "--force", *options]) == 0
    )
    net = Net().eval()
    net.load_state_dict(load_file(out))
    with torch.no_grad():
        result: torch.Tensor = net(IDS)
    return result


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_pefts(
    trained: tuple[Path, Any], tmp_path: Path, method: str, request: pytest.FixtureRequest
) -> None:
    folder, model = trained
    density = None if method in ("linear", "cat", "svd") else (1.0 if "dare" in method else 0.4)
    rank = 6 if method.endswith("svd") else None
    options = ["--combine", method]
    options += ["--density", str(density)] if density is not None else []
    options += ["--rank", str(rank)] if rank is not None else []
    on_factors = method != "cat" and not method.endswith("svd")
    if on_factors and "several ranks" in request.node.name:
        adapters = [str(folder / name) for name in "abc"]
        out = str(tmp_path / "o.safetensors")
        assert run(["fold", str(folder / "base.safetensors"), *adapters, "-o", out, "-q", *options]) == 2
        return
    expected = combined_by_peft(model, method, density, rank)
    got = folded(folder, tmp_path / "out.safetensors", *options)
    plain = folded(folder, tmp_path / "sum.safetensors")
    scale = float(expected.abs().max())
    error = float((got - expected).abs().max()) / scale
    print(f"{method:20} density {density}  rank {rank}  error {error:.1e}")
    assert error < 1e-5  # PEFT computes in float32
    if method != "cat":
        assert float((got - plain).abs().max()) / scale > 1e-3, "no different from the sum: the test shows nothing"


def test_the_default_and_cat_are_the_exact_sum(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    plain = folded(folder, tmp_path / "sum.safetensors")
    torch.testing.assert_close(folded(folder, tmp_path / "cat.safetensors", "--combine", "cat"), plain)
    unpruned = ("--combine", "dare_linear_svd", "--density", "1")
    torch.testing.assert_close(folded(folder, tmp_path / "dare.safetensors", *unpruned), plain)


def test_the_combination_is_verified_against_what_was_folded(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    options = ("--combine", "dare_ties_svd", "--density", "0.5")
    folded(folder, tmp_path / "out.safetensors", *options, "--seed", "3")
    call = ["verify", str(folder / "base.safetensors"), str(tmp_path / "out.safetensors"), "-q", *options]
    for name, weight in zip("abc", WEIGHTS, strict=True):
        call += ["--adapter", f"{folder / name}@{weight}"]
    assert run([*call, "--seed", "3"]) == 0
    assert run([*call, "--seed", "4"]) == 1


def single(name: str, a: np.ndarray, b: np.ndarray, s: float = 1.0) -> Adapter:
    return Adapter(name, name, "peft", (Entry("m", "weight", LowRank(a, b, s), (f"{name}.key",)),))


def delta_of(adapter: Adapter) -> np.ndarray:
    (entry,) = adapter.entries
    return entry.delta.materialize(FLOAT64)


def test_dare_keeps_the_density_and_the_mean_and_repeats_itself() -> None:
    one, two = (single(n, np.ones((1, 300)), np.full((200, 1), v)) for n, v in (("a", 1.0), ("b", 2.0)))

    def combine(seed: int, weights: tuple[float, float] = (1.0, 0.0)) -> np.ndarray:
        return delta_of(combine_adapters([one, two], weights, CombineOptions("dare_linear_svd", 0.3, seed=seed)))

    result = combine(0)
    assert set(np.unique(result)) == {0.0, 1.0 / 0.3}
    n = result.size
    kept = np.count_nonzero(result)
    assert abs(kept - 0.3 * n) < 5 * (n * 0.3 * 0.7) ** 0.5
    assert np.array_equal(result, combine(0))
    assert not np.array_equal(result, combine(1))
    other = combine(0, (0.0, 0.5))  # the second adapter's mask is another one
    agree = np.count_nonzero((other != 0) & (result != 0))
    assert abs(agree - 0.09 * n) < 5 * (n * 0.09 * 0.91) ** 0.5


def test_ties_by_hand() -> None:
    one = np.array([[3.0, -1.0, 2.0, 0.1]])
    two = np.array([[-1.0, -4.0, 1.0, 5.0]])
    adapters = [single("a", one, np.ones((1, 1))), single("b", two, np.ones((1, 1)))]
    # Half of each is kept: [3, 0, 2, 0] and [0, -4, 0, 5]; no conflict, so every mean is of one tensor.
    trimmed = delta_of(combine_adapters(adapters, [1.0, 2.0], CombineOptions("ties_svd", 0.5)))
    assert trimmed.tolist() == [[3.0, -8.0, 2.0, 10.0]]
    # All of it: signs of the sums [2, -5, 3, 5.1] are +, -, +, +; the second's -1 is left out of the first mean.
    whole = delta_of(combine_adapters(adapters, [1.0, 2.0], CombineOptions("ties_svd", 1.0)))
    np.testing.assert_allclose(whole, [[3.0, (-1.0 - 8.0) / 2, (2.0 + 2.0) / 2, (0.1 + 10.0) / 2]])


def test_svd_is_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    adapters = [single(n, rng.standard_normal((3, 20)), rng.standard_normal((15, 3))) for n in "ab"]
    total = sum(delta_of(adapter) for adapter in adapters)
    best = delta_of(combine_adapters(adapters, [1.0, 1.0], CombineOptions("svd", rank=2)))
    u, s, v = np.linalg.svd(total)
    np.testing.assert_allclose(best, (u[:, :2] * s[:2]) @ v[:2], atol=1e-12)


A, B = np.ones((2, 4)), np.ones((3, 2))


def with_delta(delta: Delta) -> Adapter:
    return Adapter("b", "b", "peft", (Entry("m", "weight", delta, ("key",)),))


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        ([single("a", A, B)], ("cat",), InputError, "two adapters or more"),
        ([single("a", A, B), single("b", np.ones((2, 5)), B)], ("cat",), InputError, "different shapes"),
        ([single("a", A, B), single("b", np.ones((2, 5)), B)], ("svd",), InputError, "different shapes"),
        ([single("a", A, B), single("b", np.ones((3, 4)), np.ones((3, 3)))], ("linear",), InputError, "of one rank"),
        (
            [single("a", A, B), with_delta(Addition(np.ones((3, 4))))],
            ("linear",), UnsupportedError, "a full delta has none",
        ),
        (
            [single("a", A, B), with_delta(Replacement(np.ones((3, 4))))],
            ("svd",), UnsupportedError, "replace changes the weight",
        ),
        (
            [single("a", A, B), with_delta(DoRA(LowRank(A, B, 1.0), np.ones(3)))],
            ("ties_svd", 0.5), UnsupportedError, "dora changes the weight",
        ),
        ([single("a", A, B), Adapter("b", "b", "kohya", (), naming=str.upper)], ("cat",), InputError, "Convert them"),
        ([], ("ties",), InputError, "needs --density"),
        ([], ("svd", 0.5), InputError, "prunes nothing"),
        ([], ("ties", 1.5), InputError, "above 0 and up to 1"),
        ([], ("ties", 0.5, 4), InputError, "--rank means nothing"),
        ([], ("svd", None, 0), InputError, "positive number"),
        ([], ("mean",), InputError, "expected one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_said(
    adapters: list[Adapter], options: tuple[Any, ...], error: type[LoraccError], message: str
) -> None:
    with pytest.raises(error, match=message):
        combine_adapters(adapters, [1.0] * len(adapters), CombineOptions(*options))


def test_kinds_whose_shape_is_open_are_combined_once_it_is_known(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        model: Any = peft.get_peft_model(Net(), peft.LoHaConfig(r=2, alpha=4, target_modules=["fc"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "hada" in name:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    loracc.fold(tmp_path / "base.safetensors", folders, tmp_path / "sum.safetensors")
    loracc.fold(tmp_path / "base.safetensors", folders, tmp_path / "svd.safetensors", combine="svd", rank=12)
    torch.testing.assert_close(load_file(tmp_path / "svd.safetensors"), load_file(tmp_path / "sum.safetensors"))
