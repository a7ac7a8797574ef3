"""What a deployment computes, shares, drops and refuses to mix up."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loracc
from loracc.errors import InputError
from loracc.runtime import Deployment
from loracc.switching.variants import add_variants
from tests.runtime.deployments import adapter, attach_variants, base, deployment, feed, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT warns about what the tiny models do on purpose (tied embeddings, no model card).
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_a_variant_has_the_bits_of_the_folded_model_and_the_base_its_own(tmp_path: Path) -> None:
    path = deployment(tmp_path, verify=True)
    with Deployment(path) as opened:
        assert opened.names == ("a", "b", "c")
        for name in opened.names:
            loracc.fold(tmp_path / "base.onnx", [tmp_path / name], tmp_path / f"{name}.onnx", verify=False)
            expected = outputs(tmp_path / f"{name}.onnx", feed())[0]
            np.testing.assert_array_equal(opened.run(name, feed())["y"], expected)
        plain = outputs(tmp_path / "base.onnx", feed())[0]
        for same in (None, "base"):
            np.testing.assert_array_equal(opened.run(same, feed())["y"], plain)
        assert np.abs(opened.run("a", feed())["y"] - plain).max() > 0.1
    np.testing.assert_array_equal(outputs(path, feed())[0], plain)


def test_variants_of_every_kind_compute_what_unmerged_peft_computes(tmp_path: Path) -> None:
    """GPT-2 with a tied embedding that one variant changes (so that its graph is un-shared) and others do not."""
    import peft
    import torch

    from tests.models import adapted, build, randomize, save_base, text_inputs, torch_inputs

    folder = save_base(build("gpt2"), tmp_path / "base")
    targets: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    models = {
        "tied": adapted(build("gpt2"), **{**targets, "target_modules": ["c_attn", "wte"]}),
        "dora": adapted(build("gpt2"), use_dora=True, **targets),
    }
    for name, config in {
        "ia3": peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        "vera": peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    }.items():
        models[name] = peft.get_peft_model(build("gpt2"), config).eval()
        randomize(models[name], seed=3, scale=0.3, names=lambda key: "ia3" in key or "vera_lambda" in key)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    result = attach_variants(folder, [f"{name}={tmp_path / name}" for name in models], tmp_path / "out.onnx")
    assert result.verification is not None and result.verification.verdict == "pass"
    assert {row["adapter"] for row in result.sites} == set(models)
    inputs = text_inputs(batch=3, sequence=11)
    with Deployment(tmp_path / "out.onnx") as opened:
        for name, model in models.items():
            with torch.no_grad():
                expected = model(**torch_inputs(inputs))[0].double().numpy()
            got = opened.run(name, inputs)["logits"]
            error = np.abs(got - expected).max() / np.abs(expected).max()
            print(f"{name}: max relative error {error:.1e}")
            assert error < 1e-5, name


def test_without_packing_only_rounding_differs(tmp_path: Path) -> None:
    path = deployment(tmp_path)
    with Deployment(path) as packed, Deployment(path, prepack=False, threads=1) as plain:
        for name in (None, "a"):
            got, expected = (opened.run(name, feed())["y"] for opened in (plain, packed))
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_weights_some_of_them_inside_the_graph_file(tmp_path: Path) -> None:
    import onnx_ir as ir

    from tests.formats.peft_files import lora, write_adapter
    from tests.verifying import build

    ir.save(build("mlp", ir.DataType.FLOAT16).ir, tmp_path / "base.onnx")
    write_adapter(tmp_path / "lora", lora("fc1", 16, 16) | lora("fc2", 16, 16, seed=3))
    attach_variants(tmp_path / "base.onnx", [tmp_path / "lora"], tmp_path / "out.onnx")
    loracc.fold(tmp_path / "base.onnx", [tmp_path / "lora"], tmp_path / "folded.onnx")
    x = {"x": np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)}
    with Deployment(tmp_path / "out.onnx") as opened:
        assert not list(tmp_path.glob("out.onnx.data"))  # 512 bytes each
        np.testing.assert_array_equal(opened.run("lora", x)["y"], outputs(tmp_path / "folded.onnx", x)[0])
        np.testing.assert_array_equal(opened.run(None, x)["y"], outputs(tmp_path / "base.onnx", x)[0])


@pytest.mark.parametrize("folder", [".", "models/base"])
def test_linked_weights_stay_in_the_base_file(folder: str, tmp_path: Path) -> None:
    big = tmp_path / folder / "big.onnx"
    big.parent.mkdir(parents=True, exist_ok=True)
    graph = onnx.load(base(tmp_path))
    onnx.save(graph, big, save_as_external_data=True, location="big.data", size_threshold=0)
    result = attach_variants(big, [adapter(tmp_path / "a")], tmp_path / "out.onnx", external="link")
    assert not (tmp_path / "out.onnx.data").exists()
    written = [file for file in tmp_path.rglob("out.onnx*") if file.is_file()]
    assert result.bytes == sum(file.stat().st_size for file in (*written, *(tmp_path / "out.onnx.variants").iterdir()))
    with Deployment(tmp_path / "out.onnx", verify=True) as opened:
        np.testing.assert_array_equal(opened.run(None, feed())["y"], outputs(big, feed())[0])
        assert np.abs(opened.run("a", feed())["y"] - opened.run(None, feed())["y"]).max() > 0.1


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        deployment(tmp_path / name, verify=False)
    one, two = (
        {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("out*")) if file.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 3
    stored = [sorted((tmp_path / name / "out.onnx.variants").iterdir()) for name in ("one", "two")]
    assert [file.read_bytes() for file in stored[0]] == [file.read_bytes() for file in stored[1]]


def test_the_least_recently_used_variant_is_dropped_and_lives_on_where_it_is_used(tmp_path: Path) -> None:
    with Deployment(deployment(tmp_path), capacity=2) as opened:
        first = opened.session("a")
        expected = first.run(None, feed())[0]
        opened.session("b")
        assert opened.session("a") is first
        opened.session("c")
        assert opened.loaded == ("a", "c")
        opened.session("b")
        assert opened.loaded == ("c", "b")
        np.testing.assert_array_equal(first.run(None, feed())[0], expected)
        assert opened.session("a") is not first
        np.testing.assert_array_equal(opened.run("a", feed())["y"], expected)


def test_many_threads_that_ask_for_one_variant_fold_it_once(tmp_path: Path) -> None:
    with Deployment(deployment(tmp_path)) as opened, ThreadPoolExecutor(16) as pool:
        start = threading.Barrier(16)

        def ask(index: int) -> Any:
            start.wait()
            return opened.session("ab"[index % 2])

        found = list(pool.map(ask, range(16)))
    assert len({id(session) for session in found}) == 2


def test_sessions_work_on_after_closing_and_new_ones_are_refused(tmp_path: Path) -> None:
    with Deployment(deployment(tmp_path)) as opened:
        session = opened.session("a")
        expected = session.run(None, feed())[0]
    np.testing.assert_array_equal(session.run(None, feed())[0], expected)
    with pytest.raises(InputError, match="closed"):
        opened.session("a")


def test_files_deleted_while_in_use_leave_the_running_deployment_unharmed(tmp_path: Path) -> None:
    path = deployment(tmp_path)
    with Deployment(path) as opened:
        expected = {name: opened.run(name, feed())["y"] for name in (None, "a")}
        for file in (path, tmp_path / "out.onnx.data", tmp_path / "out.onnx.variants" / "b.safetensors"):
            file.unlink()
        for name, value in expected.items():
            np.testing.assert_array_equal(opened.run(name, feed())["y"], value)
        assert np.isfinite(opened.run("c", feed())["y"]).all()  # folded from the mapped base
        with pytest.raises(InputError, match=r"variant 'b': .*b\.safetensors: cannot be read: No such file"):
            opened.session("b")
        np.testing.assert_array_equal(opened.run("a", feed())["y"], expected["a"])
    with pytest.raises(InputError, match=r"out\.onnx: cannot be read"):
        Deployment(path)


def test_variants_are_added_to_a_running_deployment(tmp_path: Path) -> None:
    path = deployment(tmp_path, ("a",))
    with Deployment(path) as opened:
        before = opened.session("a")
        new = adapter(tmp_path / "new", seed=7)
        result = add_variants(path, [f"d={new}"])
        assert result.files == ["out.onnx.variants/d.safetensors", "out.onnx.variants.json"]
        with pytest.raises(InputError, match="no variant 'd'"):
            opened.session("d")
        assert opened.reload() == ("a", "d")
        assert opened.session("a") is before
        loracc.fold(tmp_path / "base.onnx", [new], tmp_path / "d.onnx", verify=False)
        np.testing.assert_array_equal(opened.run("d", feed())["y"], outputs(tmp_path / "d.onnx", feed())[0])
        with pytest.raises(InputError, match="a variant 'd' already"):
            add_variants(path, [f"d={new}"])
        add_variants(path, [f"a={new}"], force=True)
        opened.reload()
        np.testing.assert_array_equal(opened.run("a", feed())["y"], opened.run("d", feed())["y"])
    assert not [file for file in (tmp_path / "out.onnx.variants").iterdir() if file.name.startswith(".")]


def test_an_optional_hook_sees_the_session_options(tmp_path: Path) -> None:
    seen: list[Any] = []
    with Deployment(deployment(tmp_path, ("a",)), configure=seen.append) as opened:
        opened.session("a")
    assert [type(options).__name__ for options in seen] == ["SessionOptions"]


def test_bench_times_a_variant_of_a_deployment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loracc.cli import run

    path = deployment(tmp_path, ("a",))
    stored = tmp_path / "out.onnx.variants" / "a.safetensors"
    call = ["bench", str(tmp_path / "base.onnx"), str(path), "--seconds", "0.5", "--processes", "1", "--json"]
    assert run([*call, "--adapter-file", str(stored)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == [str(tmp_path / "base.onnx"), f"{path} + a.safetensors"]
    stored.unlink()
    assert run([*call, "--adapter-file", str(stored)]) == 2
    assert "no such file" in capsys.readouterr().err
