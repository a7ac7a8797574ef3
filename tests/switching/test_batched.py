"""``attach --as batched`` and ``loracc slot``: row by row against PEFT, the base's own bits, ids that are no slot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loracc
from loracc.cli import run
from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.manifest import Manifest
from loracc.switching.slots import UNFINISHED, fill_slot
from tests import models
from tests.graphs import Builder
from tests.switching.peft_adapters import adapter, forward, session

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def text(running: Any, batch: int, sequence: int) -> dict[str, Any]:
    given = models.text_inputs(batch, sequence)
    if sequence < 3:
        given["attention_mask"][:] = 1  # a row without a token to look at has no meaning
    return {value.name: given[value.name] for value in running.get_inputs() if value.name in given}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("rank", [1, 4])
def test_rows_of_their_own(family: str, rank: int, tmp_path: Path) -> None:
    """Rank 1 has every slot's product in one matrix ("columns"), rank 4 gathers ("stacked"): GPT-2's rows are flat."""
    base = models.save_base(models.build(family), tmp_path / "base")
    modules = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    paths = [
        adapter(family, tmp_path / name, seed=seed, r=rank, target_modules=modules)
        for seed, name in ((1, "a"), (2, "b"))
    ]
    out = tmp_path / "out.onnx"
    result = loracc.attach(base, paths, out, mode="batched", slots=3)
    assert result.verification is not None and result.verification.verdict == "pass"
    layouts = {branch.layout for branch in Manifest.from_metadata(ir.load(out).metadata_props, out).branches}
    assert ("columns" if rank == 1 else "stacked") in layouts
    running = session(out)
    for sequence in (6, 1):  # prefill and decode shapes
        inputs = text(running, 5, sequence)
        expected = [forward(family, inputs, path) for path in (*paths, None)]
        ids = np.array([1, -1, 0, 2, 1])
        rows = running.run(None, {**inputs, "adapter_ids": ids})[0]
        plain = running.run(None, {**inputs, "adapter_ids": np.full(5, -1)})[0]
        assert np.abs(expected[0] - expected[2]).max() > 0.02
        for row, index in enumerate(ids):
            truth = expected[index if 0 <= index < 2 else 2]
            np.testing.assert_allclose(rows[row], truth[row], atol=3e-6)
        assert rows[[1, 3]].tobytes() == plain[[1, 3]].tobytes()


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attached")
    base = models.save_base(models.build("gpt2"), folder / "base")
    paths = [adapter("gpt2", folder / name, seed=seed) for seed, name in ((1, "a"), (2, "b"))]
    loracc.attach(base, paths, folder / "out.onnx", mode="batched", slots=3, external="data", verify=False)
    return folder


@pytest.mark.parametrize("ids", [[3, 0], [-2, 0], [0, -9], [np.iinfo(np.int64).max, 0], [np.iinfo(np.int64).min, 0]])
def test_ids_that_are_no_slot(ids: list[int], attached: Path) -> None:
    running = session(attached / "out.onnx")
    with pytest.raises(Exception, match=r"each id must be -1 \(the base\) or a slot from 0 to 2"):
        running.run(None, {**text(running, 2, 5), "adapter_ids": np.array(ids)})


def test_as_many_ids_as_rows(attached: Path) -> None:
    running = session(attached / "out.onnx")
    with pytest.raises(Exception, match=r"loracc\.delta"):
        running.run(None, {**text(running, 4, 5), "adapter_ids": np.array([0, 1])})


def test_a_slot_filled_later(attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = attached / "out.onnx"
    third = adapter("gpt2", tmp_path / "third", seed=3, r=2)
    before = (attached / "out.onnx.data").read_bytes()
    assert run(["slot", str(out), "2", f"third={third}@0.5", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["adapter"], body["slot"], body["rank"], body["room"], body["sites"]) == ("third", 2, 2, 4, 9)
    running = session(out)
    inputs = text(running, 3, 6)
    rows = running.run(None, {**inputs, "adapter_ids": np.array([2, 0, -1])})[0]
    np.testing.assert_allclose(rows[0], forward("gpt2", inputs, third, weight=0.5)[0], atol=3e-6)
    np.testing.assert_allclose(rows[1], forward("gpt2", inputs, attached / "a")[1], atol=3e-6)
    assert Manifest.from_metadata(ir.load(out).metadata_props, out).slots == ("a", "b", "third")
    assert run(["slot", str(out), "2", "--clear"]) == 0
    assert (attached / "out.onnx.data").read_bytes() == before
    assert Manifest.from_metadata(ir.load(out).metadata_props, out).slots == ("a", "b", "")


def test_what_does_not_go_into_a_slot(attached: Path, tmp_path: Path) -> None:
    out = attached / "out.onnx"
    files = {path: path.read_bytes() for path in attached.glob("out*")}
    large = adapter("gpt2", tmp_path / "large", r=8)
    for slot, given, words in (
        (0, large, "has 8, the slots have 4"),
        (3, attached / "a", "no slot 3"),
        (0, adapter("llama", tmp_path / "llama"), "fit no weight"),
        (0, adapter("gpt2", tmp_path / "wpe", target_modules=["wpe"]), "no branch in the graph"),
        (0, tmp_path / "nothing", "nothing"),
    ):
        with pytest.raises(LoraccError, match=words):
            fill_slot(out, slot, given)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_another_base_under_the_slots(attached: Path, tmp_path: Path) -> None:
    for path in attached.glob("out*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = tmp_path / "out.onnx.data"
    weight = ir.load(tmp_path / "out.onnx").graph.initializers["transformer.h.0.mlp.c_fc.weight"].const_value
    assert isinstance(weight, ir.ExternalTensor) and weight.offset is not None
    content = bytearray(data.read_bytes())
    content[weight.offset] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match="attached to another base"):
        fill_slot(tmp_path / "out.onnx", 0, attached / "b")


def test_a_crash_leaves_no_half_slot_with_a_name(
    attached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loracc.switching import slots

    for path in attached.glob("out*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def crash(_path: Path) -> None:
        raise KeyboardInterrupt

    kept = slots._sync
    monkeypatch.setattr(slots, "_sync", lambda path: crash(path) if path.suffix == ".data" else kept(path))
    out = tmp_path / "out.onnx"
    with pytest.raises(KeyboardInterrupt):
        fill_slot(out, 1, attached / "a")
    assert Manifest.from_metadata(ir.load(out).metadata_props, out).slots[1] == UNFINISHED
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}


def test_too_few_slots_and_too_little_room(tmp_path: Path) -> None:
    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    paths = [adapter("gpt2", tmp_path / name, seed=seed) for seed, name in ((1, "a"), (2, "b"))]
    for options, words in (({"slots": 1}, "there are 2 adapters"), ({"rank": 3}, "has 4, the slots have 3")):
        with pytest.raises(LoraccError, match=words):
            loracc.attach(base, paths, tmp_path / "out.onnx", mode="batched", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--slots means nothing to --as inputs"):
        loracc.attach(base, paths, tmp_path / "out.onnx", slots=2)


def test_a_batch_that_cannot_be_followed(tmp_path: Path) -> None:
    """Rows in another order than the batch's: [sequence, batch, d] made flat."""
    from safetensors.numpy import save_file

    build = Builder()
    x = build.input("x", ["batch", "sequence", 8])
    turned = build("Transpose", x, perm=[1, 0, 2])
    flat = build("Reshape", turned, build.weight(np.array([-1, 8])))
    ir.save(build.model(build("MatMul", flat, build.weight((8, 12), "lin.weight"))), tmp_path / "base.onnx")
    rng = np.random.default_rng(0)
    factors = {"A": rng.standard_normal((2, 8)), "B": rng.standard_normal((12, 2))}
    tensors = {f"base_model.model.lin.lora_{role}.weight": f.astype(np.float32) for role, f in factors.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(UnsupportedError, match="which rows of its input"):
        loracc.attach(
            tmp_path / "base.onnx", [tmp_path / "adapter.safetensors"], tmp_path / "o.onnx", mode="batched", alpha=2.0
        )
