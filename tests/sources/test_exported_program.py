"""``.pt2`` files: mapped weights, kept samples, refusals; and nothing in one of them gets to run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from loracc.errors import InputError, UnsupportedError
from loracc.model import LoadOptions
from loracc.quiet import quiet
from loracc.sources.exported_program import load_exported_program, load_program, program_weight_names
from loracc.sources.pt2_archive import read_archive
from loracc.sources.pt2_safety import unsafe_parts
from loracc.sources.torch_trace import TORCH_LOGGERS
from loracc.tensors import PermutedTensor
from tests.models import build, text_inputs, torch_inputs

AUTO = torch.export.Dim.AUTO


def save(module: torch.nn.Module, path: Path, *args: Any, dynamic: Any = None, **kwargs: Any) -> Path:
    with torch.no_grad(), quiet(*TORCH_LOGGERS):
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
        torch.export.save(program, path)
    return path


class Net(torch.nn.Module):
    """A linear layer, a transposed parameter, a tied pair, a buffer and a constant."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 6)
        self.turned = torch.nn.Parameter(torch.randn(6, 4).t())
        self.embed = torch.nn.Embedding(9, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(9))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        h = torch.tanh(self.first(x)) @ self.turned.t() + self.embed(ids)
        return {"logits": self.head(h) + self.shift * torch.tensor([0.5]), "nothing": None}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    module = Net().eval()
    path = tmp_path_factory.mktemp("net") / "net.pt2"
    inputs = {"x": torch.randn(2, 4), "ids": torch.tensor([3, 1])}
    return module, save(module, path, dynamic={"x": {0: AUTO}, "ids": {0: AUTO}}, **inputs)


def run(model: ir.Model, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def test_weights_stay_and_samples_are_kept(net: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    module, path = net
    base = load_exported_program(path, LoadOptions())
    values = base.ir.graph.initializers
    for name in ("first.weight", "first.bias", "head.weight", "shift"):
        tensor = values[name].const_value
        tensor = tensor.base if isinstance(tensor, PermutedTensor) else tensor
        assert isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == path, name
        assert np.array_equal(tensor.numpy(), module.state_dict()[name].numpy()), name
    assert list(base.sample_inputs) == ["x", "ids"] and base.notes == ()
    inputs = {"x": np.ones((3, 4), np.float32), "ids": np.array([0, 8, 2])}
    with torch.no_grad():
        expected = module(**torch_inputs(inputs))["logits"].numpy()
    got = run(base.ir, inputs, tmp_path)
    np.testing.assert_allclose(got["logits"], expected, rtol=1e-5, atol=1e-6)
    sites = {site.name: site for site in base.sites}
    assert sites.keys() == {"first.weight", "first.bias", "turned", "embed.weight", "head.weight", "shift"}
    assert sites["embed.weight"].initializer == sites["head.weight"].initializer == "head.weight"
    assert sites["embed.weight"].kind == "embedding" and sites["head.weight"].kind == "linear"
    assert sites["embed.weight"].consumer != sites["head.weight"].consumer


def test_a_transposed_view_of_its_storage_is_read_as_what_it_is(net: tuple[torch.nn.Module, Path]) -> None:
    module, path = net
    archive = read_archive(path)
    assert not archive.weights["turned"].plain and archive.weights["first.weight"].plain
    [site] = load_exported_program(path, LoadOptions()).sites.by_name()["turned"]
    value = load_exported_program(path, LoadOptions()).ir.graph.initializers[site.initializer].const_value
    assert value is not None
    stored = module.state_dict()["turned"].numpy()
    assert any(np.array_equal(value.numpy(), w) for w in (stored, stored.T))


def test_weights_are_mapped_and_tied_ones_stay_one(net: tuple[torch.nn.Module, Path]) -> None:
    module, path = net
    before = path.read_bytes()
    weights = load_program(read_archive(path)).state_dict
    for name, tensor in module.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    with torch.no_grad():
        weights["embed.weight"].zero_()
    assert not weights["head.weight"].any(), "one tensor"
    assert path.read_bytes() == before, "a private map"


def test_placeholders_know_their_weights(net: tuple[torch.nn.Module, Path]) -> None:
    program = load_program(read_archive(net[1]))
    assert set(program_weight_names(program).values()) == set(program.state_dict)


def test_bert_in_bfloat16_from_its_own_kwargs(tmp_path: Path) -> None:
    model = build("bert", dtype="bfloat16")
    inputs = torch_inputs(text_inputs())
    path = save(model, tmp_path / "bert.pt2", dynamic={k: {0: AUTO, 1: AUTO} for k in inputs}, **inputs)
    base = load_exported_program(path, LoadOptions())
    assert base.sample_inputs.keys() == {"input_ids", "attention_mask"}
    weight = base.ir.graph.initializers["encoder.layer.1.output.dense.weight"].const_value
    assert weight is not None and weight.dtype == ir.DataType.BFLOAT16
    expected = model.encoder.layer[1].output.dense.weight.detach().float().numpy()
    assert np.array_equal(weight.numpy().astype(np.float32), expected.T)
    assert [o.name for o in base.ir.graph.outputs] == ["last_hidden_state", "pooler_output"]


def test_the_users_inputs_come_first(net: tuple[torch.nn.Module, Path]) -> None:
    base = load_exported_program(net[1], LoadOptions(inputs=("x:float32[5,4]", "ids:int64[5]")))
    assert base.sample_inputs["x"].shape == (5, 4)
    with pytest.raises(InputError, match="no input 'y'"):
        load_exported_program(net[1], LoadOptions(inputs=("y:float32[5,4]",)))


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.1), torch.nn.BatchNorm1d(4)])
def test_training_mode_is_refused(layer: torch.nn.Module, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), layer)
    path = save(module.train(), tmp_path / "m.pt2", torch.zeros(2, 4))
    with pytest.raises(UnsupportedError, match=r"training mode.*\n.*model\.eval\(\)"):
        load_exported_program(path, LoadOptions())
    load_exported_program(save(module.eval(), path, torch.zeros(2, 4)), LoadOptions())


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def edited(source: Path, target: Path, edit: Callable[[str, bytes], bytes], **extra: bytes) -> Path:
    """A copy of an archive with other bytes in some members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        names = old.namelist()
        for name in names:
            new.writestr(name, edit(name.partition("/")[2], old.read(name)))
        for name, data in extra.items():
            new.writestr(f"{names[0].partition('/')[0]}/{name}", data)
    return target


def document(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """An edit of models/model.json."""

    def edit(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        parsed = json.loads(data)
        change(parsed)
        return json.dumps(parsed).encode()

    return edit


def first_node(parsed: Any) -> Any:
    return parsed["graph_module"]["graph"]["nodes"][0]


def with_target(target: str) -> Callable[[str, bytes], bytes]:
    return document(lambda parsed: first_node(parsed).__setitem__("target", target))


def with_size(expression: str) -> Callable[[str, bytes], bytes]:
    def change(parsed: Any) -> None:
        sizes = parsed["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": expression, "hint": {"as_int": 2}}}

    return document(change)


def torch_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_pickled_samples_are_left_out_and_not_run(net: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    bomb = torch_pickle((Bomb(proof), {}))
    path = edited(net[1], tmp_path / "m.pt2", lambda name, data: bomb if "sample_inputs" in name else data)
    base = load_exported_program(path, LoadOptions())
    assert not proof.exists()
    assert base.sample_inputs == {} and "sample inputs are not used" in base.notes[0]
    with quiet(*TORCH_LOGGERS):
        torch.export.load(path)
    assert proof.exists(), "torch alone runs it: this test would pass for nothing otherwise"


def pickled_weight(bomb: bytes) -> Callable[[str, bytes], bytes]:
    def edit(name: str, data: bytes) -> bytes:
        if name == "data/weights/weight_0":
            return bomb
        if name != "data/weights/model_weights_config.json":
            return data
        config = json.loads(data)
        entry = next(e for e in config["config"].values() if e["path_name"] == "weight_0")
        entry.update(use_pickle=True)
        return json.dumps(config).encode()

    return edit


def custom_object(name: str, data: bytes) -> bytes:
    if name != "data/constants/model_constants_config.json":
        return data
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {"bomb": entry}}).encode()


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (with_target("torch.os.system"), "calls 'torch.os.system'"),
        (with_target("torch.ops.load_library.x"), "calls"),
        (with_target("torch.ops.aten.__class__"), "calls"),
        (with_target("_operator.attrgetter"), "calls"),
        (with_target("#mine:x"), "calls"),
        (with_size("__import__('os').mkdir('/x')"), "evaluates"),
        (with_size("Symbol('s0').is_integer"), "evaluates"),
        (with_size("exec(chr(97))"), "evaluates"),
        (with_size("sympify('1')"), "evaluates"),
    ],
)
def test_programs_that_could_run_code_are_refused(
    net: tuple[torch.nn.Module, Path], tmp_path: Path, edit: Callable[[str, bytes], bytes], text: str
) -> None:
    with pytest.raises(InputError, match=rf"could run code.*{text}") as caught:
        load_exported_program(edited(net[1], tmp_path / "m.pt2", edit), LoadOptions())
    assert "--allow-pickle" in str(caught.value)


def test_pickled_weights_and_objects_are_refused_and_not_run(net: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    weight = edited(net[1], tmp_path / "w.pt2", pickled_weight(torch_pickle(Bomb(proof))))
    bomb = {"data/constants/opaque_obj_0": pickle.dumps(Bomb(proof))}
    constant = edited(net[1], tmp_path / "c.pt2", custom_object, **bomb)
    code = edited(net[1], tmp_path / "a.pt2", lambda _name, data: data, **{"data/aotinductor/model/x.so": b"\x7fELF"})
    for path, text in ((weight, "is pickled"), (constant, "'bomb' is pickled"), (code, "compiled code")):
        with pytest.raises(InputError, match=text):
            load_exported_program(path, LoadOptions())
    assert not proof.exists()


def test_real_programs_raise_no_alarm(net: tuple[torch.nn.Module, Path]) -> None:
    archive = read_archive(net[1])
    assert unsafe_parts(archive, archive.read_json("models/model.json")) == []


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.999])
def test_truncated_archives_are_refused(net: tuple[torch.nn.Module, Path], tmp_path: Path, keep: float) -> None:
    data = net[1].read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"not a sound \.pt2 archive"):
        load_exported_program(path, LoadOptions())


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda n, d: b"{" if n == "models/model.json" else d, InputError, "not JSON"),
        (lambda n, d: b"{}" if n == "models/model.json" else d, InputError, "cannot read this program"),
        (lambda n, d: b"[]" if n.endswith("weights_config.json") else d, InputError, "malformed"),
        (lambda n, d: d[:-4] if n == "data/weights/weight_0" else d, InputError, "out of bounds"),
        (lambda n, d: d[:-4] if n == "data/weights/weight_1" else d, InputError, "weight_1 has 92 bytes, expected 96"),
        (document(lambda p: p["schema_version"].update(major=99)), InputError, "schema version"),
    ],
)
def test_damaged_programs_are_refused(
    net: tuple[torch.nn.Module, Path],
    tmp_path: Path,
    edit: Callable[[str, bytes], bytes],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        load_exported_program(edited(net[1], tmp_path / "m.pt2", edit), LoadOptions())


def test_compressed_and_old_archives_are_refused(net: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt2"
    with zipfile.ZipFile(net[1]) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="compressed"):
        load_exported_program(packed, LoadOptions())
    old_format = edited(net[1], tmp_path / "old.pt2", lambda _n, d: d, **{"data/weights/model.pt": b""})
    with pytest.raises(UnsupportedError, match=r"torch before 2\.8"):
        load_exported_program(old_format, LoadOptions())


def test_nothing_is_printed(net: tuple[torch.nn.Module, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_exported_program(net[1], LoadOptions())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
