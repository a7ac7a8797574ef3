"""What is shown to people: names come from files, and a terminal obeys what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["console", "printable"]


def printable(text: str) -> str:
    """Control characters as their escapes; lines and tabs stay.

    >>> printable("a\\x1b[31mb\\n")
    'a\\\\x1b[31mb\\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def console(*, as_json: bool, quiet: bool) -> Any:
    """Where tables and messages go: stdout, or stderr when stdout is for JSON; nowhere when quiet.

    Brackets and colons in names are no markup.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for text, style, control in super().render(*arguments, **options):
                yield Segment(text if control else printable(text), style, control)

    found = Plain(stderr=as_json, quiet=quiet, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = 160  # nobody's window: module paths stay whole in a log
    return found
