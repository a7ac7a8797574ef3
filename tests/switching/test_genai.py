"""onnxruntime-genai generates from a graph of ``attach --as inputs`` with ``og.Adapters``: its own builder's graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

import loracc
from loracc.manifest import Manifest
from tests.genai_models import build_with_genai, generate, save_tokenizer, tiny_llama
from tests.models import FAMILIES, adapted
from tests.test_genai import LENGTH, PROMPT, greedy

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def generate_with(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Greedy tokens of one model with each adapter active in turn."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    found = {}
    for name in names:
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=LENGTH, min_length=LENGTH)
        generator = og.Generator(model, parameters)
        generator.set_active_adapter(adapters, name)
        generator.append_tokens(PROMPT)
        while not generator.is_done():
            generator.generate_next_token()
        found[name] = [int(token) for token in generator.get_sequence(0)]
    return found


def test_the_builders_graph(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    expected = {"": greedy(model)}
    for name, seed in (("one", 1), ("two", 2)):
        tuned = adapted(tiny_llama(), seed=seed, scale=0.05, **FAMILIES["llama"].lora)
        tuned.save_pretrained(tmp_path / name)
        expected[name] = greedy(tuned)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    built = build_with_genai(tmp_path / "base", tmp_path / "built", "fp32")
    out = tmp_path / "out"
    shutil.copytree(built.parent, out, ignore=shutil.ignore_patterns("*.onnx*", "cache"))
    result = loracc.attach(built, [tmp_path / "one", tmp_path / "two"], out / "model.onnx", original=tmp_path / "base")
    assert result.verification is not None and result.verification.verdict == "pass"
    manifest = Manifest.from_metadata(ir.load(out / "model.onnx").metadata_props, out)
    fused = [weight for branch in manifest.branches for weight in branch.weights if len(weight.places) == 3]
    assert len(fused) == 2  # one branch serves q, k and v of a layer
    assert generate(out, PROMPT, LENGTH) == expected.pop("")
    assert generate_with(out, ["one", "two"]) == expected
