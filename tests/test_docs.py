"""What the documents promise exists: commands, options, scripts, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import loracc
from loracc.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_with_examples(name: str) -> None:
    command = main.commands[name]
    assert command.help and command.epilog and f"loracc {name} " in command.epilog
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


def console_lines() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    return [line[2:].split("  #")[0].strip() for block in blocks for line in block.splitlines() if line[:2] == "$ "]


@pytest.mark.parametrize("line", [line for line in console_lines() if line.startswith("loracc ")])
def test_commands_in_the_readme_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with command.make_context(name, arguments):
        pass  # a wrong option or a missing argument raises


def test_scripts_in_the_readme_exist() -> None:
    scripts = [line for line in console_lines() if line.startswith("scripts/")]
    assert {"scripts/demo", "scripts/test"} <= set(scripts)
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_public_names_exist_and_are_documented() -> None:
    for name in loracc.__all__:
        assert getattr(loracc, name).__doc__
