"""Numbers, verdicts and evidence in words: what the terminal, the report's page and CI say alike."""

from __future__ import annotations

from typing import Any

__all__ = ["CHECKS", "byte_count", "counted", "evidence", "flip", "number", "percent"]

#: The checks of a verification, in the order in which they are shown.
CHECKS = ("numbers", "structure", "latency")


def counted(number: int, thing: str) -> str:
    """``1 site``, ``2 sites``.

    >>> counted(1, "site"), counted(2, "site")
    ('1 site', '2 sites')
    """
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def number(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share with one decimal."""
    return "-" if value is None else f"{100 * value:.1f} %"


def byte_count(count: int) -> str:
    """A size for a person.

    >>> byte_count(90_904_000)
    '90.9 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def evidence(name: str, check: dict[str, Any]) -> str:
    """What a check found, in one line."""
    if check.get("reason"):
        return str(check["reason"])
    if name == "numbers" and check.get("max_relative_error") is not None:
        measured = f"max relative error {number(check['max_relative_error'])}, tolerance {number(check['tolerance'])}"
        return f"{measured} ({check['measured_on']}); {check['summary']}"
    if name == "latency" and check.get("ratio") is not None:
        low, high = check["interval"]
        return f"ratio {check['ratio']:.4f}, 95 % interval [{low:.4f}, {high:.4f}], margin ±{check['margin']:.3g}"
    return str(check.get("summary", ""))


def flip(check: dict[str, Any]) -> str:
    """The threshold that decided, and where the verdict would have turned."""
    return str((check.get("threshold") or {}).get("text", ""))
