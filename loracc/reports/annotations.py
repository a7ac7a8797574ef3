"""What GitHub Actions shows of a verification: annotations on the run, and the job's summary.

Workflow commands are lines of a job's log (``::error title=T::text``). Text is percent-encoded as the runner decodes
it, so that no name of a site can end its line and begin another command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loracc.errors import InputError
from loracc.reports.junit import failed_sites
from loracc.reports.report_markdown import report_text
from loracc.reports.words import CHECKS, evidence, flip

__all__ = ["annotation_lines", "write_summary"]

_LEVELS = {"fail": "error", "inconclusive": "warning"}
#: The runner keeps ten errors a step.
_SITES = 6


def annotation_lines(judged: dict[str, Any], output: str) -> Iterator[str]:
    """A line for each check that said no or could not tell, for the worst sites, and one where all is well.

    Args:
        judged: ``to_json`` of a verification.
        output: What was verified.
    """
    bad = [name for name in CHECKS if judged.get(name, {}).get("verdict") in _LEVELS]
    for name in bad:
        check = judged[name]
        text = ". ".join(part for part in (evidence(name, check), flip(check)) if part)
        yield _line(_LEVELS[check["verdict"]], f"{output}: {name} {check['verdict']}", text)
    for index, (site, reason) in enumerate(failed_sites(judged)):
        if index < _SITES:
            yield _line("error", f"{output}: {site}", reason)
    if not bad and judged["verdict"] == "pass":
        yield _line("notice", f"{output}: verified", "; ".join(_passed(judged)))


def write_summary(body: dict[str, Any], environment: Mapping[str, str] | None = None) -> None:
    """Append the Markdown report to the job's summary, where the runner has a file for one.

    Raises:
        InputError: The file cannot be written.
    """
    path = (os.environ if environment is None else environment).get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(report_text(body) + "\n")
    except OSError as error:
        raise InputError(f"GITHUB_STEP_SUMMARY={path}: cannot be written: {error.strerror or error}.") from error


def _passed(judged: dict[str, Any]) -> Iterator[str]:
    for name in CHECKS:
        if judged.get(name, {}).get("verdict") == "pass":
            yield f"{name}: {evidence(name, judged[name])}"


def _line(level: str, title: str, text: str) -> str:
    return f"::{level} title={_encoded(title, ':,')}::{_encoded(text, '')}"


def _encoded(text: str, more: str) -> str:
    """As the runner's own toolkit encodes a command's data (``%``, CR, LF) and its properties (``:`` and ``,`` too)."""
    for sign in ("%", "\r", "\n", *more):
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text
