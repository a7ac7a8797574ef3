"""What continuous integration reads: JUnit, annotations, the job's summary, the pytest fixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loracc.cli import run
from loracc.reports.annotations import annotation_lines
from loracc.reports.junit import junit_text
from tests.reports.reported import HOSTILE, model_and_adapter, spoil

ROOT = Path(__file__).parents[2]
VERIFY = ["verify", "base.onnx", "bad.onnx", "--adapter", "adapter"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ci")
    base, adapter = model_and_adapter(folder)
    assert run(["fold", str(base), str(adapter), "-o", str(folder / "out.onnx"), "--no-verify", "--quiet"]) == 0
    spoil(folder / "out.onnx", folder / "bad.onnx")
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(models)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    yield models


@pytest.fixture
def judged(here: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run([*VERIFY, "--json"]) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_junit_has_a_case_for_each_check_and_each_failed_site(here: Path) -> None:
    assert run([*VERIFY, "--junit", "bad.xml", "--quiet"]) == 1
    suite = ElementTree.parse("bad.xml").getroot()
    cases = {(case.get("classname"), case.get("name")): case for case in suite.findall("testcase")}
    assert set(cases) == {
        ("loracc.verify", "numbers"),
        ("loracc.verify", "structure"),
        ("loracc.verify", "latency"),
        ("loracc.verify.site", "block.1.query.weight"),
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "1")
    failure = cases["loracc.verify.site", "block.1.query.weight"].find("failure")
    assert failure is not None and "correctly rounded" in str(failure.get("message"))


def test_junit_is_xml_whatever_the_names(judged: dict[str, Any]) -> None:
    name = f"{HOSTILE}\x00\x1b]]>\ud800"
    for site in judged["numbers"]["weights"]["sites"]:
        site["name"] = name
    suite = ElementTree.fromstring(junit_text(judged).encode("utf-8"))
    [case] = [case for case in suite if case.get("classname") == "loracc.verify.site"]
    assert case.get("name") == f"{HOSTILE}\ufffd\ufffd]]>\ufffd"


def test_annotations_name_the_check_and_the_site(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    assert run([*VERIFY, "--quiet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("::error title=bad.onnx%3A numbers fail::block.1.query.weight: ")
    assert lines[1].startswith("::error title=bad.onnx%3A block.1.query.weight::")
    summary = (here / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("### ❌ fail: bad.onnx")
    assert "block.1.query.weight" in summary
    assert run([*VERIFY, "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "fail" and "::error title=" in captured.err
    after = (here / "summary.md").read_text(encoding="utf-8")
    assert after == summary + summary.replace("--quiet", "--json"), "appended, as other steps' are"


def test_a_passed_fold_is_a_notice_and_elsewhere_nothing_is_said(here: Path, monkeypatch: Any, capsys: Any) -> None:
    fold = ["fold", "base.onnx", "adapter", "-o", "again.onnx", "--force", "--quiet"]
    assert run(fold) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(fold) == 0
    assert capsys.readouterr().out.startswith("::notice title=again.onnx%3A verified::numbers: max relative error")


def test_no_name_begins_another_command(judged: dict[str, Any]) -> None:
    for site in judged["numbers"]["weights"]["sites"]:
        site["name"], site["reason"] = "a,b::x\n::stop-commands::t", "100 % wrong\r\n::error::no"
    lines = list(annotation_lines(judged, "out\n::error::x"))
    assert all("\n" not in line and "\r" not in line and line.startswith("::error title=") for line in lines)
    assert "a%2Cb%3A%3Ax%0A%3A%3Astop-commands%3A%3At::100 %25 wrong%0D%0A::error::no" in lines[-1]


_TESTS = """
import sys

def test_nothing_heavy_is_loaded(request):
    # What the run loads by itself may be there; the plugin adds none of it.
    assert not {"torch", "onnxruntime", "onnx_ir", "numpy", "matplotlib"} & set(sys.modules)

def test_right(assert_equivalent):
    assert assert_equivalent("base.onnx", "adapter", "out.onnx").verdict == "pass"

def test_wrong(assert_equivalent):
    assert_equivalent("base.onnx", ["adapter"], "bad.onnx")
"""


def test_the_pytest_fixture(here: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_export.py"
    test.write_text(_TESTS, encoding="utf-8")
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    options = ["-p", "loracc.pytest_plugin", "-p", "no:cacheprovider", "-W", "error", "-q", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(test)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert "bad.onnx is not base.onnx with adapter\nnumbers: block.1.query.weight: " in done.stdout
    assert "Traceback" not in done.stdout


def test_the_fixture_is_an_entry_point() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"loracc": "loracc.pytest_plugin"}
