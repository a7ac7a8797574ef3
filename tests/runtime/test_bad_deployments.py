"""Damaged, foreign and hostile deployments: refused with what is wrong, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loracc
from loracc.errors import BindingError, CheckFailed, InputError, LoraccError
from loracc.runtime import Deployment
from loracc.runtime.manifest import manifest_path, variants_folder
from loracc.switching.variants import add_variants
from tests.formats.peft_files import write_adapter
from tests.runtime.deployments import adapter, attach_variants, base, deployment, feed

Edit = Callable[[Path], None]


def manifest(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "out.onnx.variants.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


def set_path(content: dict[str, Any], path: str, *, where: str = "graph") -> None:
    entry = content["weights"][0] if where == "weights" else content[where]
    (entry if "path" in entry else entry["a"]["file"])["path"] = path


def overwrite(name: str, content: bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


def flip(name: str, at: int) -> Edit:
    def edit(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return edit


def cut(name: str, size: int) -> Edit:
    return lambda folder: os.truncate(folder / name, size)


MANIFEST = "out.onnx.variants.json"
BROKEN_ON_OPENING: dict[str, tuple[Edit, str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "cannot be read: No such file"),
    "not JSON": (overwrite(MANIFEST, b"{"), "not a JSON file"),
    "deep JSON": (overwrite(MANIFEST, b"[" * 100_000), "not a JSON file"),
    "not text": (overwrite(MANIFEST, b"\xff\xfe\x00"), "not a JSON file"),
    "another file": (overwrite(MANIFEST, b"[]"), "its format is not"),
    "later version": (manifest(lambda m: m.update(version=9)), "version 9 of the manifest"),
    "no graph": (manifest(lambda m: m.pop("graph")), "missing or of the wrong type"),
    "number as path": (manifest(lambda m: m["graph"].update(path=3)), "missing or of the wrong type"),
    "a path that no system has": (manifest(lambda m: m["graph"].update(path="\ud800")), "not a path inside its folder"),
    "variants a list": (manifest(lambda m: m.update(variants=[])), "missing or of the wrong type"),
    "absolute graph": (manifest(lambda m: set_path(m, "/etc/passwd")), "not a path inside its folder"),
    "upwards graph": (manifest(lambda m: set_path(m, "../base.onnx")), "not a path inside its folder"),
    "upwards weights": (manifest(lambda m: set_path(m, "x/../../y", where="weights")), "not a path inside"),
    "upwards variant": (manifest(lambda m: set_path(m, "..\\a", where="variants")), "not a path inside"),
    "drive": (manifest(lambda m: set_path(m, "C:\\a", where="variants")), "not a path inside"),
    "graph cut": (cut("out.onnx", 100), "not the file that this deployment was made with: 100 bytes"),
    "graph changed": (flip("out.onnx", 60), r"out\.onnx: not the file .* sha256"),
    "weights cut": (cut("out.onnx.data", 6000), r"out\.onnx\.data: not the file .*: 6,000 bytes"),
    "weights changed": (flip("out.onnx.data", 5000), r"out\.onnx\.data: not the file .* sha256"),
    "weights unnamed": (manifest(lambda m: m.update(weights=[])), "which the manifest does not name"),
}


@pytest.mark.parametrize("case", BROKEN_ON_OPENING)
def test_a_broken_deployment_is_refused_when_it_is_opened(case: str, tmp_path: Path) -> None:
    path = deployment(tmp_path)
    edit, message = BROKEN_ON_OPENING[case]
    edit(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        Deployment(path)
    assert raised.value.hint


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    path = deployment(tmp_path / "dep")
    os.rename(tmp_path / "dep" / "out.onnx.data", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "dep" / "out.onnx.data")
    with pytest.raises(InputError, match="a link that leaves its folder"):
        Deployment(path)


def test_a_byte_between_the_samples_of_a_large_file_needs_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loracc.runtime.digests.WHOLE_BYTES", 0)
    monkeypatch.setattr("loracc.runtime.digests._BLOCK", 16)
    path = deployment(tmp_path)
    flip("out.onnx.data", 4096 + 50)(tmp_path)
    Deployment(path).close()
    with pytest.raises(InputError, match="sha256"):
        Deployment(path, verify=True)
    flip("out.onnx.data", 0)(tmp_path)
    with pytest.raises(InputError, match="sha256"):
        Deployment(path)


STORED = "out.onnx.variants/a.safetensors"
BROKEN_VARIANT: dict[str, tuple[Edit, str]] = {
    "deleted": (lambda folder: (folder / STORED).unlink(), "variant 'a': .*cannot be read: No such file"),
    "cut": (cut(STORED, 500), "variant 'a': .*500 bytes"),
    "changed": (flip(STORED, -3), "variant 'a': .*sha256"),
}


@pytest.mark.parametrize("case", BROKEN_VARIANT)
def test_a_broken_variant_is_refused_and_the_others_go_on(case: str, tmp_path: Path) -> None:
    path = deployment(tmp_path)
    edit, message = BROKEN_VARIANT[case]
    with Deployment(path) as opened:
        expected = opened.run("b", feed())["y"]
        edit(tmp_path)
        for _ in range(2):  # a failure is not kept
            with pytest.raises(InputError, match=message):
                opened.session("a")
        np.testing.assert_array_equal(opened.run("b", feed())["y"], expected)
        assert np.isfinite(opened.run("c", feed())["y"]).all()


def test_an_unknown_name_lists_the_names(tmp_path: Path) -> None:
    with (
        Deployment(deployment(tmp_path)) as opened,
        pytest.raises(InputError, match=r"no variant 'z'\.\n.*a, b, c; and 'base'"),
    ):
        opened.session("z")


def redigested(folder: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Put another file in a variant's place, with a manifest that says it belongs there."""
    from loracc.runtime.digests import digest_file

    save_file(tensors, folder / STORED, metadata)
    digest = digest_file(folder / STORED, STORED)
    manifest(lambda m: m["variants"]["a"]["file"].update(nbytes=digest.nbytes, sha256=digest.sha256))(folder)


SITE = {
    "module": "fc1",
    "parameter": "weight",
    "kind": "linear",
    "initializer": "fc1.weight",
    "layout": {"perm": [1, 0], "start": 0, "stop": None},
    "consumer": "",
    "source": "name",
}
DELTA = {"class": "LowRank", "fields": {"a": {"tensor": "0"}, "b": {"tensor": "1"}, "s": 1.0}}


def stored(site: Any = SITE, delta: Any = DELTA, version: int = 1) -> str:
    row = {"site": site, "adapter": "a", "key": "fc1.weight", "way": "name", "delta": delta}
    return json.dumps({"version": version, "bindings": [row]})


HOSTILE = {
    "no metadata": (None, "no stored variant"),
    "not JSON": ("{", "does not hang together"),
    "later version": (stored(version=2), "version 2 of its format"),
    "no such weight": (stored({**SITE, "initializer": "fc9.weight"}), "no weight 'fc9.weight'"),
    "rows outside": (stored({**SITE, "layout": {"perm": [1, 0], "start": 40, "stop": 99}}), "rows 40 to 99"),
    "axes that are none": (stored({**SITE, "layout": {"perm": [1, 2], "start": 0, "stop": None}}), "2 axes"),
    "another shape": (stored({**SITE, "initializer": "fc2.weight"}), r"shape \[48, 32\], the weight has \[32, 48\]"),
    "no kind": (stored(delta={"class": "Popen", "fields": {"args": "true"}}), "does not hang together"),
    "a text as an array": (stored(delta={"class": "LowRank", "fields": {**DELTA["fields"], "a": "x"}}), "LowRank.a is"),  # type: ignore[dict-item]  # a JSON object
    "a tensor that is not there": (
        stored(delta={"class": "LowRank", "fields": {"a": {"tensor": "7"}, "b": {"tensor": "1"}, "s": 1.0}}),
        "does not hang together",
    ),
    "a field too many": (
        stored(delta={"class": "LowRank", "fields": {**DELTA["fields"], "c": 1}}),  # type: ignore[dict-item]
        "does not hang together",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_variant_made_up_by_somebody_else_is_refused(case: str, tmp_path: Path) -> None:
    path = deployment(tmp_path)
    text, message = HOSTILE[case]
    tensors = {"0": np.zeros((2, 32), np.float32), "1": np.zeros((48, 2), np.float32)}
    redigested(tmp_path, tensors, {} if text is None else {"loracc.bindings": text})
    with Deployment(path) as opened, pytest.raises(InputError, match=message):
        opened.session("a")


def attach_wrong_module(folder: Path) -> None:
    attach_variants(base(folder), [adapter(folder / "x", modules=("fc1", "fc7"))], folder / "new.onnx")


def attach_other_shape(folder: Path) -> None:
    tensors = {
        "base_model.model.fc1.lora_A.weight": np.ones((2, 7), np.float32),
        "base_model.model.fc1.lora_B.weight": np.ones((48, 2), np.float32),
    }
    attach_variants(base(folder), [write_adapter(folder / "x", tensors)], folder / "new.onnx")


def attach_zero(folder: Path) -> None:
    tensors = {
        "base_model.model.fc1.lora_A.weight": np.ones((2, 32), np.float32),
        "base_model.model.fc1.lora_B.weight": np.zeros((48, 2), np.float32),
    }
    attach_variants(base(folder), [write_adapter(folder / "x", tensors)], folder / "new.onnx")


WRONG_CALLS: dict[str, tuple[Callable[[Path], object], type[LoraccError], str]] = {
    "a module the graph lacks": (attach_wrong_module, BindingError, r"fc7\.weight"),
    "another base's shapes": (attach_other_shape, BindingError, "fc1"),
    "an adapter that does nothing": (attach_zero, CheckFailed, "variant 'x' did not pass"),
    "named base": (
        lambda f: attach_variants(base(f), [f"base={adapter(f / 'x')}"], f / "new.onnx"),
        InputError,
        "named 'base'",
    ),
    "named twice": (
        lambda f: attach_variants(base(f), [f"n={adapter(f / 'x')}", f"n={adapter(f / 'y')}"], f / "new.onnx"),
        InputError,
        "two adapters are named",
    ),
    "no adapter": (lambda f: attach_variants(base(f), [], f / "new.onnx"), InputError, "no adapter was given"),
    "not ONNX": (
        lambda f: attach_variants(base(f), [adapter(f / "x")], f / "new.pt2"),
        InputError,
        "attach writes .onnx files",
    ),
    "inline": (
        lambda f: attach_variants(base(f), [adapter(f / "x")], f / "new.onnx", external="inline"),
        InputError,
        "cannot be shared",
    ),
    "another dtype": (
        lambda f: attach_variants(base(f), [adapter(f / "x")], f / "new.onnx", dtype="fp16"),
        InputError,
        "would be rounded twice",
    ),
    "added in another dtype": (
        lambda f: loracc.attach(deployment(f), [adapter(f / "x")], f / "out.onnx", mode="variants", dtype="fp16"),
        InputError,
        "keeps its weights as they are",
    ),
    "there already": (
        lambda f: attach_variants(base(f), [adapter(f / "x")], deployment(f)),
        InputError,
        "exists already",
    ),
    "added to no deployment": (
        lambda f: add_variants(base(f), [adapter(f / "x")]),
        InputError,
        re.escape("base.onnx.variants.json: cannot be read"),
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_what_cannot_be_attached_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    call, kind, message = WRONG_CALLS[case]
    with pytest.raises(kind, match=message):
        call(tmp_path)
    left = [file.name for file in tmp_path.rglob("*") if file.name.startswith((".", "new"))]
    assert not left


def test_a_folder_that_cannot_be_written_leaves_the_deployment_as_it_was(tmp_path: Path) -> None:
    graph = deployment(tmp_path)
    before = manifest_path(graph).read_bytes()
    added = adapter(tmp_path / "x")
    variants_folder(graph).rename(tmp_path / "aside")
    variants_folder(graph).write_text("a file in its place")
    with pytest.raises(InputError, match=r"out\.onnx\.variants: cannot be read or written"):
        add_variants(graph, [added])
    assert manifest_path(graph).read_bytes() == before


def test_a_variant_that_does_not_fit_leaves_the_deployment_as_it_was(tmp_path: Path) -> None:
    path = deployment(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("out*") if file.is_file()}
    with pytest.raises(BindingError):
        add_variants(path, [adapter(tmp_path / "x", modules=("fc1", "fc7"))])
    assert {file: file.read_bytes() for file in tmp_path.rglob("out*") if file.is_file()} == before
    assert sorted(file.name for file in (tmp_path / "out.onnx.variants").iterdir()) == [
        f"{name}.safetensors" for name in "abc"
    ]
