"""Made-up inputs are ones the model can take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.sample_inputs import check_inputs, draw_inputs, random_inputs, vocabulary_limits
from loracc.sites import SiteTable
from tests.verifying import VOCABULARY, build


def inputs_only(**specs: tuple[ir.DataType, list[int | str | None] | None]) -> BaseModel:
    values = [
        ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))
        for name, (dtype, shape) in specs.items()
    ]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 18}, name="g")
    return BaseModel(Path("m.onnx"), "onnx", ir.Model(graph, ir_version=10), SiteTable())


I64, F32 = ir.DataType.INT64, ir.DataType.FLOAT
TEXT = inputs_only(
    input_ids=(I64, ["batch", "sequence"]),
    attention_mask=(I64, ["batch", "past + sequence"]),
    position_ids=(I64, ["batch", "sequence"]),
    past=(F32, ["batch", 2, "past", 4]),
    flag=(ir.DataType.BOOL, [3]),
    half=(ir.DataType.BFLOAT16, ["batch", None]),
)


def test_ids_stay_inside_the_embedding() -> None:
    model = build("attention")
    assert vocabulary_limits(model.ir) == {"input_ids": VOCABULARY}
    draws, _ = draw_inputs(model, draws=5)
    ids = np.stack([draw["input_ids"] for draw in draws])
    assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < VOCABULARY and ids.max() > VOCABULARY // 2
    assert not np.array_equal(ids[0], ids[1])


def test_a_front_ends_ranges_count_too() -> None:
    model = replace(TEXT, input_ranges={"input_ids": (0, 7)})
    assert draw_inputs(model)[0][0]["input_ids"].max() < 7


def test_sizes_are_consistent_and_sums_are_sums() -> None:
    made = random_inputs(TEXT.ir, sizes={"past": 3})
    batch, sequence = made["input_ids"].shape
    assert made["attention_mask"].shape == (batch, sequence + 3)
    assert made["past"].shape == (batch, 2, 3, 4)
    assert made["half"].dtype == ir.DataType.BFLOAT16.numpy()
    assert {name: array.dtype for name, array in made.items()}["flag"] == np.bool_
    np.testing.assert_array_equal(made["position_ids"][0], np.arange(sequence))


def test_a_mask_is_ones_with_some_padding() -> None:
    mask = random_inputs(TEXT.ir)["attention_mask"]
    assert mask[0].all() and mask[-1, 0] == 1 and mask[-1, -1] == 0
    assert set(np.unique(mask)) == {0, 1}


def test_the_same_seed_gives_the_same_inputs() -> None:
    one, two, other = (draw_inputs(TEXT, seed=seed)[0] for seed in (1, 1, 2))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)
    assert any(not np.array_equal(one[0][name], other[0][name]) for name in one[0])


def test_the_models_sample_comes_first_and_is_varied_in_its_shapes() -> None:
    sample = random_inputs(TEXT.ir, seed=9, sizes={"sequence": 5})
    draws, origin = draw_inputs(replace(TEXT, sample_inputs=sample), draws=3)
    assert "sample" in origin and len(draws) == 3
    assert all(np.array_equal(draws[0][name], sample[name]) for name in sample)
    assert all(draw[name].shape == sample[name].shape for draw in draws for name in sample)
    assert sorted(draws[1]["input_ids"].ravel()) == sorted(sample["input_ids"].ravel())  # nothing tells their range


def test_given_inputs_are_the_only_ones_and_are_checked() -> None:
    given = random_inputs(TEXT.ir)
    draws, origin = draw_inputs(TEXT, given=given)
    assert len(draws) == 1 and "given" in origin
    wrong = {**given, "input_ids": given["input_ids"].astype(np.int32), "flag": np.ones(4, bool), "extra": np.ones(1)}
    del wrong["past"]
    with pytest.raises(InputError) as caught:
        check_inputs(TEXT.ir, wrong)
    for words in (
        "input_ids: int32, the model takes int64",
        "flag: shape [4]",
        "past: missing",
        "extra: the model has no",
    ):
        assert words in caught.value.message


@pytest.mark.parametrize("spec", [(ir.DataType.STRING, ["n"]), (F32, None)])
def test_what_cannot_be_made_up_is_said(spec: tuple[ir.DataType, list[int | str | None] | None]) -> None:
    with pytest.raises(InputError, match="made up") as caught:
        random_inputs(inputs_only(x=spec).ir)
    assert caught.value.hint is not None and "--inputs" in caught.value.hint


def test_a_decoders_symbols_fit_each_other() -> None:
    """onnxruntime-genai's names: nothing says that the total is a sum, nor how wide a head is."""
    model = inputs_only(
        input_ids=(I64, ["batch_size", "sequence_length"]),
        attention_mask=(I64, ["batch_size", "total_sequence_length"]),
        past_key=(F32, ["batch_size", 2, "past_sequence_length", "kv_cache_dim"]),
    )
    graph = model.ir.graph
    query = ir.Value(name="qkv", type=ir.TensorType(F32), shape=ir.Shape(["batch_size", "sequence_length", 24]))
    node = ir.node(
        "GroupQueryAttention",
        [query, None, None, graph.inputs[2], graph.inputs[2]],
        {"num_heads": 4, "kv_num_heads": 2},
        domain="com.microsoft",
    )
    graph.append(node)
    first, step, _ = draw_inputs(model)[0]
    assert first["attention_mask"].shape == first["input_ids"].shape and first["attention_mask"].all()
    assert first["past_key"].shape == (2, 2, 0, 3)
    assert step["input_ids"].shape == (2, 1)
    assert step["past_key"].shape == (2, 2, 7, 3) and step["attention_mask"].shape == (2, 8)
