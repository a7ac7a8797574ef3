"""ExportedProgram -> ir.Model: the exporter's own op counts, the module's own names, the same bytes each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import pytest
import torch

from loracc.errors import UnsupportedError
from loracc.quiet import quiet
from loracc.sources.torch_export import name_dimensions, tied_groups, to_ir
from loracc.sources.torch_trace import TORCH_LOGGERS
from loracc.tensors import dims
from tests.models import build

AUTO = torch.export.Dim.AUTO


def exported(module: torch.nn.Module, *args: torch.Tensor, axes: int = 1, **kwargs: torch.Tensor) -> Any:
    dynamic: Any = (
        {name: dict.fromkeys(range(axes), AUTO) for name in kwargs}
        if kwargs
        else tuple(dict.fromkeys(range(axes), AUTO) for _ in args)
    )
    with torch.no_grad(), quiet(*TORCH_LOGGERS):
        return torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic, strict=False)


def text_program(name: str, **changes: Any) -> Any:
    model = build(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.config.use_cache = False
    ids = torch.zeros(2, 7, dtype=torch.long)
    return exported(model, axes=2, input_ids=ids, attention_mask=torch.ones_like(ids))


def counts(model: ir.Model) -> Mapping[str, int]:
    return Counter(node.op_type for node in model.graph)


def default_export(program: Any, opset: int | None = None) -> ir.Model:
    with quiet(*TORCH_LOGGERS):
        result = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset)
    assert result is not None
    return result.model


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


class Conv(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.relu(self.norm(self.first(x))))


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return {
        "mlp": exported(mlp(), torch.zeros(2, 8)),
        "mlp3d": exported(mlp(), torch.zeros(2, 3, 8), axes=2),
        **{name: text_program(name) for name in ("bert", "gpt2", "llama")},
    }


@pytest.mark.parametrize("name", ["mlp", "mlp3d", "bert", "gpt2", "llama"])
def test_op_counts_are_the_default_exports(programs: dict[str, Any], name: str) -> None:
    model = to_ir(programs[name])
    assert counts(model) == counts(default_export(programs[name]))
    held = set(model.graph.initializers)
    shared = {alias for group in tied_groups(programs[name]) for alias in group}
    used = set(programs[name].graph_signature.parameters) - shared
    assert used <= held, "a parameter lost its name"


def test_opset_is_the_callers_and_fusions_follow_it(programs: dict[str, Any]) -> None:
    model = to_ir(programs["llama"], 23)
    assert model.opset_imports[""] == 23
    assert counts(model) == counts(default_export(programs["llama"], 23))
    assert "RMSNormalization" in counts(model)


def test_convolutions_keep_their_norm() -> None:
    """The default export fuses BatchNormalization into the weight, where no delta could be added any more."""
    program = exported(Conv(), torch.zeros(2, 3, 8, 8))
    model = to_ir(program)
    assert Counter(counts(model)) - Counter(counts(default_export(program))) == {"BatchNormalization": 1}
    assert set(program.graph_signature.parameters) <= set(model.graph.initializers)


def test_same_program_same_bytes_and_no_path_of_this_machine(programs: dict[str, Any]) -> None:
    first, second = (
        ir.serde.serialize_model(to_ir(text_program("bert"))).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second
    assert b"site-packages" not in first and b".py" not in first and b"0x7f" not in first


def test_small_tied_embedding_is_two_initializers_and_a_large_one_keeps_its_transpose(programs: dict[str, Any]) -> None:
    small = to_ir(programs["gpt2"]).graph.initializers
    assert dims(small["transformer.wte.weight"].const_value) == (99, 32)  # type: ignore[arg-type]
    assert dims(small["lm_head.weight"].const_value) == (32, 99)  # type: ignore[arg-type]

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(300, 32)
            self.head = torch.nn.Linear(32, 300, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = exported(Tied(), torch.zeros(2, 7, dtype=torch.long), axes=2)
    model = to_ir(program)
    assert tied_groups(program) == [("embed.weight", "head.weight")]
    assert counts(model) == counts(default_export(program)) == {"Gather": 1, "Transpose": 1, "MatMul": 1}
    assert len(model.graph.initializers) == 1


def test_dimensions_get_names_and_constant_ones_are_reported(programs: dict[str, Any]) -> None:
    model = to_ir(programs["bert"])
    wanted = dict.fromkeys(("input_ids", "attention_mask"), ("batch", "sequence"))
    assert name_dimensions(model, wanted) == []
    shapes = [[str(dim) for dim in value.shape or ()] for value in (*model.graph.inputs, *model.graph.outputs)]
    assert shapes == [["batch", "sequence"]] * 2 + [["batch", "sequence", "32"], ["batch", "32"]]
    fixed = to_ir(exported(mlp(), torch.zeros(2, 8)))
    assert name_dimensions(fixed, {"input": ("batch", "features")}) == ["input[1] = 8"]


def test_meta_weights_are_never_read() -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    program = exported(module, torch.zeros(2, 3, 8, device="meta"), axes=2)
    model = to_ir(program)
    assert counts(model) == {"MatMul": 2, "Add": 2}
    assert dims(model.graph.initializers["0.weight"].const_value) == (8, 16)  # type: ignore[arg-type]


def test_an_operator_without_translation_is_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(UnsupportedError, match="linalg_eig"):
        to_ir(exported(Odd(), torch.eye(3)))


def test_nothing_is_printed(programs: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    to_ir(programs["mlp"])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
