"""What a command tells GitHub Actions, when it runs there; elsewhere nothing."""

from __future__ import annotations

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
    from loracc.reports.annotations import annotation_lines, in_github_actions, write_summary
    from loracc.reports.report_body import report_body, verification_of

    if not in_github_actions():
        return
    for line in annotation_lines(verification_of(result), output):
        click.echo(line, err=as_json)
    write_summary(report_body(kind, {"output": output, **result}))


def announce_refusal(error: CheckFailed) -> None:
    """The annotations of an output that did not pass, and was not written."""
    from loracc.reports.annotations import annotation_lines, in_github_actions

    if in_github_actions():
        for line in annotation_lines(error.verification, "not written"):
            click.echo(line, err=True)
