"""What an output says about its making, finding its inputs by it, and the base given back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

import loracc
from loracc import provenance
from loracc.cli import main
from loracc.errors import CheckFailed, InputError
from loracc.provenance import Identity, Provenance, weights_digest
from loracc.sources import load_model
from tests.models import FAMILIES, adapted, build, save_base
from tests.proof.test_faults import put, tensor
from tests.verifying import build as build_graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),  # torch's own exporter
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),  # PEFT, on the embedding
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose head is tied, two adapters, and what is folded from them."""
    root = tmp_path_factory.mktemp("gpt2")
    save_base(build("gpt2"), root / "base")
    for seed, name in enumerate(("one", "two")):
        adapted(build("gpt2"), seed=seed, **FAMILIES["gpt2"].lora).save_pretrained(root / name)
    specs = [f"first={root / 'one'}", f"{root / 'two'}@0.5"]
    loracc.fold(root / "base", specs, root / "out.onnx", verify=False)
    loracc.fold(root / "base", specs, root / "merged", verify=False)
    loracc.fold(root / "base", specs, root / "half.onnx", dtype="fp16", verify=False)
    return root


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_record_is_the_same_in_a_graph_and_beside_a_checkpoint(gpt2: Path) -> None:
    beside = json.loads((gpt2 / "merged" / "loracc.json").read_text())
    inside = load_model(gpt2 / "out.onnx").ir.metadata_props[provenance.KEY]
    assert json.loads(inside) == beside
    assert [(one["name"], one["weight"]) for one in beside["adapters"]] == [("first", 1.0), ("two", 0.5)]
    assert {site["adapter"]: site["scale"] for site in beside["sites"]} == {"first": 2.0, "two": 1.0}
    assert beside["base"]["digest"].startswith("sha256:") and beside["versions"]["loracc"] == loracc.__version__
    assert str(gpt2) not in inside
    found = json.loads(call("inspect", gpt2 / "out.onnx", "--json").stdout)["made_by_loracc"]
    assert found == beside
    assert "adapter two: peft, sha256:" in call("inspect", gpt2 / "merged").stdout


@pytest.mark.parametrize("out", ["out.onnx", "merged", "half.onnx"])
def test_verify_finds_base_and_adapters_by_digest(gpt2: Path, out: str) -> None:
    assert loracc.verify(None, gpt2 / out, search=[gpt2]).verdict == "pass"


def test_what_is_not_found_is_named(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"not found: the base .* an adapter .* 1 files there could not be read"):
        loracc.verify(None, gpt2 / "out.onnx", search=[tmp_path])
    with pytest.raises(InputError, match="no --search DIR"):
        loracc.verify(None, gpt2 / "out.onnx")
    with pytest.raises(InputError, match="does not say from what it was made"):
        loracc.verify(None, gpt2 / "base", search=[gpt2])
    assert call("verify", "a", "b", "c").exit_code == 2


def test_unfold_gives_back_a_checkpoint_file_for_file(gpt2: Path, tmp_path: Path) -> None:
    done = call("unfold", gpt2 / "merged", "--base", gpt2 / "base", "-o", tmp_path / "back", "--json")
    assert done.exit_code == 0 and "transformer.wte.weight" in json.loads(done.stdout)["restored"]
    names = sorted(path.name for path in (gpt2 / "base").iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (gpt2 / "base" / name).read_bytes()


@pytest.mark.parametrize("out", ["out.onnx", "half.onnx"])
def test_unfold_gives_back_a_graph(gpt2: Path, out: str, tmp_path: Path) -> None:
    result = loracc.unfold(gpt2 / out, gpt2 / "base", tmp_path / "back.onnx")
    restored = load_model(tmp_path / "back.onnx").ir
    assert result.digest == weights_digest(restored) == weights_digest(load_model(gpt2 / "base").ir)
    assert bool(result.notes) == (out == "half.onnx")


def test_unfold_refuses_another_base_and_a_changed_output(gpt2: Path, tmp_path: Path) -> None:
    save_base(build("gpt2", seed=1), tmp_path / "other")
    with pytest.raises(InputError, match="was not made from it"):
        loracc.unfold(gpt2 / "out.onnx", tmp_path / "other", tmp_path / "back.onnx")
    with pytest.raises(InputError, match="restored as the kind of file it is"):
        loracc.unfold(gpt2 / "out.onnx", gpt2 / "base", tmp_path / "back")
    graph = ir.load(gpt2 / "out.onnx")
    name = "transformer.h.0.ln_1.weight"
    put(graph, name, tensor(graph, name) + 1)
    ir.save(graph, tmp_path / "touched.onnx")
    with pytest.raises(CheckFailed, match=f"no delta is recorded for {name}"):
        loracc.unfold(tmp_path / "touched.onnx", gpt2 / "base", tmp_path / "back.onnx")
    assert not (tmp_path / "back.onnx").exists()


def test_a_fold_of_a_fold_keeps_the_chain(gpt2: Path, tmp_path: Path) -> None:
    loracc.fold(gpt2 / "merged", [gpt2 / "one"], tmp_path / "again", verify=False)
    record = json.loads((tmp_path / "again" / "loracc.json").read_text())
    assert record["previous"] == json.loads((gpt2 / "merged" / "loracc.json").read_text())


def test_large_models_are_sampled_and_any_sampled_change_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_graph("attention").ir
    whole = weights_digest(model)
    monkeypatch.setattr(provenance, "WHOLE_BYTES", 100)
    sampled = weights_digest(model)
    assert whole.startswith("sha256:") and sampled.startswith("sha256-sampled:")
    put(model, "head.weight", tensor(model, "head.weight") * 2)
    assert weights_digest(model) != sampled


_RECORD = Provenance(Identity("onnx", 1, 4, "sha256:0"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body | {"schema": 9}, "schema 9"),
        (lambda body: {}, "damaged"),
        (lambda body: body | {"adapters": [3]}, "damaged"),
        (lambda body: body | {"base": {"digest": 1}}, "damaged"),
        (lambda body: [], "damaged"),
    ],
)
def test_damaged_records_are_users_errors(change: Callable[[Any], Any], message: str) -> None:
    assert Provenance.from_text(_RECORD.to_text(), "x") == replace(_RECORD)
    with pytest.raises(InputError, match=message):
        Provenance.from_text(json.dumps(change(_RECORD.to_json())), "x.onnx")
