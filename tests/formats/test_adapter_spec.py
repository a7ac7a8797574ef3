"""``NAME=PATH@WEIGHT``."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracc.errors import InputError
from loracc.formats import AdapterSpec, parse_adapter_spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", AdapterSpec(None, "a.safetensors")),
        ("a@0.7", AdapterSpec(None, "a", 0.7)),
        ("style=a@-1e-1", AdapterSpec("style", "a", -0.1)),
        ("style=a=b", AdapterSpec("style", "a=b")),
        ("user@host", AdapterSpec(None, "user@host")),
        ("a/b=c", AdapterSpec(None, "a/b=c")),
    ],
)
def test_readings_of_paths_that_do_not_exist(text: str, expected: AdapterSpec) -> None:
    assert parse_adapter_spec(text) == expected


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x=y@0.5", "y@2", "z"):
        Path(name).touch()
    assert parse_adapter_spec("x=y@0.5") == AdapterSpec(None, "x=y@0.5")
    assert parse_adapter_spec("x=y@2") == AdapterSpec("x", "y@2")
    assert parse_adapter_spec("x=y@2@0.5") == AdapterSpec("x", "y@2", 0.5)
    assert parse_adapter_spec("x=z@3") == AdapterSpec("x", "z", 3.0)


@pytest.mark.parametrize("text", ["a@nan", "a@inf", "a@-Infinity", "a@1e999", "a@0", "", "x=", "@0.5"])
def test_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_adapter_spec(text)
