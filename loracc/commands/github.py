"""What a command tells GitHub Actions, when it runs there; elsewhere nothing."""

from __future__ import annotations

import os
from typing import Any

import click

from loracc.errors import CheckFailed

__all__ = ["announce", "announce_refusal"]


def announce(kind: str, result: dict[str, Any], output: str, *, as_json: bool) -> None:
    """Annotations in the log, and the report in the job's summary.

    Args:
        kind: "fold", "attach" or "verify".
        result: Its ``to_json``.
        output: What was made or verified.
        as_json: stdout is a result's; annotations go to stderr, which the runner reads as well.
    """
    if not _in_github_actions():
        return
    from loracc.reports.annotations import annotation_lines, write_summary
    from loracc.reports.report_body import report_body, verification_of

    for line in annotation_lines(verification_of(result), output):
        click.echo(line, err=as_json)
    write_summary(report_body(kind, {"output": output, **result}))


def _in_github_actions() -> bool:
    """Whether a runner reads our output; asked before anything is imported to write with."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def announce_refusal(error: CheckFailed) -> None:
    """The annotations of an output that did not pass, and was not written."""
    if _in_github_actions():
        from loracc.reports.annotations import annotation_lines

        for line in annotation_lines(error.verification, "not written"):
            click.echo(line, err=True)
