"""Reports written to files: the ending says in which form."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracc.errors import InputError, require

__all__ = ["ENDINGS", "check_reports", "write_reports", "write_text"]

#: What ``--report`` writes.
ENDINGS = (".json", ".html", ".md")


def check_reports(paths: Sequence[str | Path], others: Sequence[Path], *, endings: Sequence[str] = ENDINGS) -> None:
    """Refuse reports that cannot be written, or that would replace a part of ``others``, before any work is done.

    Raises:
        InputError: The ending is another, the folder is missing or not writable, or the path is an input or the output.
        MissingExtraError: A page is asked for and nothing draws its plots.
    """
    for path in map(Path, paths):
        if endings and path.suffix.lower() not in endings:
            raise InputError(f"{path}: written as {' or '.join(endings)}.", hint=f"Name it {path.stem}{endings[0]}.")
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written: its folder is missing or not writable, or it is a folder.")
        here = path.resolve()
        for other in (other.resolve() for other in others):
            if here == other or other in here.parents:
                raise InputError(f"{path}: the report would replace a part of {other}.", hint="Choose another name.")
        if ".html" in endings and path.suffix.lower() == ".html":
            require("matplotlib", "draw a report's plots")


def write_reports(body: dict[str, Any], paths: Sequence[str | Path]) -> None:
    """Write one report in every form that is asked for.

    Raises:
        InputError: A file cannot be written.
    """
    for path in map(Path, paths):
        write_text(path, _in_form(body, path.suffix.lower()))


def _in_form(body: dict[str, Any], ending: str) -> str:
    if ending == ".html":
        from loracc.reports.report_page import report_html

        return report_html(body)
    if ending == ".md":
        from loracc.reports.report_markdown import report_text

        return report_text(body)
    return json.dumps(body, indent=2) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from error
