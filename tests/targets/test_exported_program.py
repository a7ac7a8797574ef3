"""The .pt2 target: the base's archive with other weights, which torch loads and computes with."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from loracc.deltas import LowRank
from loracc.errors import UnsupportedError
from loracc.folded import Binding, annotate
from loracc.lower import lower
from loracc.model import BaseModel, LoadOptions
from loracc.sources import load_model
from loracc.sources.module_model import trace_module
from loracc.targets.exported_program import plan_exported_program, saved_program, write_exported_program
from loracc.targets.zip_checksums import update_checksums

IDS = torch.tensor([[1, 5, 2], [7, 0, 3]])


class Net(torch.nn.Module):
    """An embedding tied to the head, a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(40, 24)
        self.middle = torch.nn.Linear(24, 24)
        self.head = torch.nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(ids)))


def delta(seed: int, shape: tuple[int, int]) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(
        rng.standard_normal((3, shape[1])).astype(np.float32),
        rng.standard_normal((shape[0], 3)).astype(np.float32),
        0.5,
    )


MIDDLE, TIED = delta(1, (24, 24)), delta(2, (40, 24))


def dense(d: LowRank) -> torch.Tensor:
    return torch.from_numpy(0.5 * d.b.astype(np.float64) @ d.a.astype(np.float64))


def base(folder: Path) -> Path:
    path = folder / "base.pt2"
    torch.export.save(torch.export.export(Net().eval(), (IDS,)), path)
    return path


def folded(model: BaseModel, names: Sequence[str] = ("middle",)) -> BaseModel:
    bindings = [
        Binding(site, MIDDLE if site.module == "middle" else TIED, "a", site.name, "name")
        for site in model.sites
        if site.module in names and site.parameter == "weight"
    ]
    assert len(bindings) == len(names), [site.name for site in model.sites]
    annotate(model.ir, bindings)
    return lower(model)


def expected(*, tied: bool = False) -> torch.Tensor:
    net = Net().eval().double()
    with torch.no_grad():
        net.middle.weight += dense(MIDDLE)
        if tied:
            net.embed.weight += dense(TIED)
        result: torch.Tensor = net(IDS)
    return result


def computed(path: Path) -> torch.Tensor:
    result: torch.Tensor = torch.export.load(path).module()(IDS)
    return result.detach().double()


def members(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum is right
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_only_the_folded_weight_changes(tmp_path: Path) -> None:
    path = base(tmp_path)
    write_exported_program(folded(load_model(path)), tmp_path / "out.pt2")
    torch.testing.assert_close(computed(tmp_path / "out.pt2"), expected(), rtol=1e-5, atol=1e-5)
    before, after = members(path), members(tmp_path / "out.pt2")
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    assert changed[0].startswith("base/data/weights/weight_")
    assert not torch.allclose(computed(tmp_path / "out.pt2"), computed(path))


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    lowered = folded(load_model(base(tmp_path)))
    for name in ("one", "two"):
        plan = plan_exported_program(lowered, tmp_path / name)
        assert plan.folded == 24 * 24 * 4
        plan.write(workers=1 if name == "one" else 2)
        assert (tmp_path / name).stat().st_size == plan.nbytes
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_both_ends_of_a_tie_may_change_together(tmp_path: Path) -> None:
    model = load_model(base(tmp_path))
    tied = [site for site in model.sites if site.module in ("embed", "head")]
    assert len(tied) == 2
    annotate(model.ir, [Binding(site, TIED, "a", site.name, "name") for site in tied])
    annotate(model.ir, [Binding(s, MIDDLE, "a", s.name, "name") for s in model.sites if s.name == "middle.weight"])
    write_exported_program(lower(model), tmp_path / "out.pt2")
    torch.testing.assert_close(computed(tmp_path / "out.pt2"), expected(tied=True), rtol=1e-5, atol=1e-5)


def test_a_tie_is_not_broken(tmp_path: Path) -> None:
    lowered = folded(load_model(base(tmp_path)), ["embed"])
    with pytest.raises(UnsupportedError, match="changes only one of them"):
        plan_exported_program(lowered, tmp_path / "out.pt2")


def test_a_module_in_memory_is_saved_first(tmp_path: Path) -> None:
    model = trace_module(tmp_path / "net.pt", Net().eval(), LoadOptions(inputs=("ids:int64[2,3]",)), format="module")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "out.pt2"
        with saved_program(model, out) as saved:
            write_exported_program(folded(saved), out)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["out.pt2"]
    program = torch.export.load(tmp_path / "one" / "out.pt2")
    torch.testing.assert_close(program.module()(ids=IDS).detach().double(), expected(), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "one" / "out.pt2").read_bytes() == (tmp_path / "two" / "out.pt2").read_bytes()


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    model = load_model(base(tmp_path))
    with pytest.raises(UnsupportedError, match="would change from FLOAT to FLOAT16"):
        plan_exported_program(lower(model, ir.DataType.FLOAT16), tmp_path / "out.pt2")


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    model = load_model(base(tmp_path))
    model.origin, model.format = None, "onnx"
    with pytest.raises(UnsupportedError, match=r"holds a PyTorch program, and this model is none \(onnx\)"):
        plan_exported_program(model, tmp_path / "out.pt2")


def test_checksums_before_the_bytes_are_put_right_too(tmp_path: Path) -> None:
    path = tmp_path / "plain.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/one", b"first")
        archive.writestr("a/two", b"second")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"first", b"FIRST").replace(b"second", b"SECOND"))
    update_checksums(path, {"a/one", "a/two"})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("a/one") == b"FIRST"
    assert len(path.read_bytes()) == len(data)
