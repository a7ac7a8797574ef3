"""Reports of real folds and verifications: what is in them, that nothing else is, and that they do not change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from loracc.cli import run
from loracc.reports.report_page import report_html
from tests.reports.reported import HOSTILE, SIZE, model_and_adapter, spoil

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
FORMS = ("html", "md", "json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fold and its reports; a verification of it, and of one with a wrong weight, and theirs."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("GITHUB_ACTIONS", raising=False)
        model_and_adapter(folder)
        assert run(["fold", "base.onnx", "adapter", "-o", "out.onnx", *reports("fold")]) == 0
        spoil(folder / "out.onnx", folder / "bad.onnx")
        for name, code in (("out", 0), ("bad", 1)):
            assert run(["verify", "base.onnx", f"{name}.onnx", "--adapter", "adapter", *reports(name)]) == code
        yield folder


def reports(name: str) -> list[str]:
    return [word for form in FORMS for word in ("--report", f"{name}.{form}")]


def body(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["fold", "out", "bad"])
def test_json_keeps_its_schema(folder: Path, name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(body(folder, name), SCHEMA)


def test_the_schema_refuses_what_is_no_report(folder: Path) -> None:
    for broken in ({"schema": 2}, {"report": "other"}, {"deltas": [{"name": "x"}]}, {"verdict": "maybe"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body(folder, "out") | broken, SCHEMA)


def test_every_delta_is_there_with_its_spectrum(folder: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    rows = body(folder, "fold")["deltas"]
    assert len(rows) == 6
    for row in rows:
        key = f"base_model.model.{row['name'].removesuffix('.weight')}.lora_"
        whole = row["scale"] * tensors[key + "B.weight"].astype(float) @ tensors[key + "A.weight"].astype(float)
        expected = np.linalg.svd(whole, compute_uv=False)[: row["rank"]]
        assert row["spectrum"] == pytest.approx(expected, rel=1e-5)
        shares = expected / expected.sum()
        assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert row["stable_rank"] == pytest.approx((expected**2).sum() / expected[0] ** 2)


def test_rounding_errors_are_the_written_files(folder: Path) -> None:
    good, bad = body(folder, "out")["rounding_errors"], body(folder, "bad")["rounding_errors"]
    assert good["elements"] == sum(good["counts"]) == 6 * SIZE * SIZE
    assert good["beyond"] == 0 and good["skipped"] == 0
    assert bad["beyond"] > SIZE * SIZE / 2


class Page(HTMLParser):
    """What a browser would see: tags, their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["fold", "out", "bad"])
def test_the_page_runs_nothing_and_loads_nothing(folder: Path, name: str) -> None:
    text = (folder / f"{name}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert "://" not in text and "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text
    for key, value in page.attributes:
        assert not key.startswith("on") and key != "src"
        if key in ("href", "xlink:href"):
            assert value and value.startswith("#")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert HOSTILE in page.text, "the output's name, escaped once"


def test_names_are_text(folder: Path) -> None:
    """Checkpoints may name their weights, and people their adapters, anything."""
    names = json.dumps(HOSTILE)[1:-1]
    told = json.dumps(body(folder, "bad")).replace("block.1.query", f"block.1.{names}")
    told = told.replace('"adapter": "adapter"', f'"adapter": "{names}"')
    page = Page(report_html(json.loads(told) | {"provenance": body(folder, "bad")["provenance"]}))
    assert page.text.count(HOSTILE) > 6 and not {"img", "script"} & set(page.tags)


def test_ids_are_unique_and_references_lead_somewhere(folder: Path) -> None:
    text = (folder / "out.html").read_text(encoding="utf-8")
    ids = [value for key, value in Page(text).attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert used and {one or other for one, other in used} <= set(ids)


def test_both_themes_and_no_colour_of_the_plots_own(folder: Path) -> None:
    text = (folder / "fold.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text and "[data-theme=dark]" in text
    style, rest = text.split("</style>", 1)
    variables = set(re.findall(r"var\((--\w+)\)", text))
    for theme in re.findall(r"color-scheme:(?:light|dark);([^}]*)\}", style):
        assert variables - {"--tone"} <= {pair.split(":")[0].strip() for pair in theme.split(";")}
    assert not re.search(r"(?:fill|stroke|color): ?(?:#|rgb|black|white)", rest)


def test_the_page_says_what_was_found(folder: Path) -> None:
    text = Page((folder / "out.html").read_text(encoding="utf-8")).text
    found = body(folder, "out")
    for words in ("Does it compute the same?", "Singular values", "Effective rank", "What the rounding left"):
        assert words in text
    assert found["numbers"]["threshold"]["text"] in text
    for one in (found["provenance"]["base"], *found["provenance"]["adapters"], found["provenance"]["output"]):
        assert one["digest"] in text
    command = "loracc verify base.onnx out.onnx --adapter adapter --report out.html --report out.md --report out.json"
    assert found["provenance"]["command"] == command
    assert command in text


def test_a_failure_names_the_weight(folder: Path) -> None:
    [wrong] = [row for row in body(folder, "bad")["deltas"] if row["verdict"] == "fail"]
    assert wrong["name"] == "block.1.query.weight"
    page = Page((folder / "bad.html").read_text(encoding="utf-8")).text
    assert "What is wrong" in page and wrong["reason"] in page
    text = (folder / "bad.md").read_text(encoding="utf-8")
    assert "**1 weight is wrong**" in text and "| block.1.query.weight |" in text


def test_markdown_is_a_table_whatever_the_names(folder: Path) -> None:
    text = (folder / "out.md").read_text(encoding="utf-8")
    assert text.startswith("### ✅ pass: out.onnx (loracc verify)\n")
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.count("|") in (5, 9), line
    assert "<script" not in text and "$x" not in text
    assert "| numbers | ✅ pass | max relative error" in text


def test_the_same_inputs_give_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {form: (folder / f"out.{form}").read_bytes() for form in FORMS}
    assert run(["verify", "base.onnx", "out.onnx", "--adapter", "adapter", *reports("out")]) == 0
    assert {form: (folder / f"out.{form}").read_bytes() for form in FORMS} == before
    assert report_html(body(folder, "out")).encode() == before["html"], "and the page is made of the JSON alone"
    assert str(folder) not in before["html"].decode()


def test_a_dry_run_and_an_unverified_fold_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run(["fold", "base.onnx", "adapter", "-o", "plain.onnx", "--no-verify", *reports("plain")]) == 0
    assert run(["fold", "base.onnx", "adapter", "-o", "dry.onnx", "--dry-run", *reports("dry")]) == 0
    for name, words in (("plain", "the verification was turned off"), ("dry", "nothing was written")):
        jsonschema.validate(body(folder, name), SCHEMA)
        for form in ("html", "md"):
            assert words in (folder / f"{name}.{form}").read_text(encoding="utf-8")


def test_a_refused_fold_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file, save_file

    monkeypatch.chdir(folder)
    tensors = load_file("adapter/adapter_model.safetensors")
    Path("zero").mkdir()
    Path("zero/adapter_config.json").write_bytes(Path("adapter/adapter_config.json").read_bytes())
    save_file({key: value * 0 for key, value in tensors.items()}, "zero/adapter_model.safetensors")
    assert run(["fold", "base.onnx", "zero", "-o", "zero.onnx", *reports("zero")]) == 1
    assert not Path("zero.onnx").exists()
    found = body(folder, "zero")
    jsonschema.validate(found, SCHEMA)
    assert found["verification"]["verdict"] == "fail" and found["files"] == []
    assert "no signal" in Page(Path("zero.html").read_text(encoding="utf-8")).text


def test_attached_adapters_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run(["attach", "base.onnx", "a=adapter", "b=adapter@0.5", "-o", "attached.onnx", *reports("attached")]) == 0
    found = body(folder, "attached")
    jsonschema.validate(found, SCHEMA)
    assert {row["adapter"] for row in found["deltas"]} == {"a", "b"} and len(found["deltas"]) == 12
    assert "Singular values" in Path("attached.html").read_text(encoding="utf-8")
