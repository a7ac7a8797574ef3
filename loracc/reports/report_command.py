"""The command line that a report was made by, as it could be typed again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

__all__ = ["command_line"]


def command_line() -> str | None:
    """``loracc verify base.onnx out.onnx ...`` with what was given; None when called from Python."""
    context = click.get_current_context(silent=True)
    if context is None or context.command.name not in ("fold", "attach", "verify"):
        return None
    words = ["loracc", str(context.command.name)]
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name is not None:
            words += _words(parameter, context.params[parameter.name])
    return shlex.join(words)


def _words(parameter: click.Parameter, value: Any) -> Iterator[str]:
    many = parameter.multiple or parameter.nargs == -1
    if isinstance(parameter, click.Option) and parameter.is_flag:
        off = parameter.secondary_opts[0] if parameter.secondary_opts else ""
        yield max(parameter.opts, key=len) if value else off
        return
    if isinstance(parameter, click.Option) and not many and not isinstance(value, str | int | float):
        value = ",".join(str(int(item)) for item in value)  # lists that a callback read from one word
    for item in value if many else (value,):
        if isinstance(parameter, click.Option):
            yield max(parameter.opts, key=len)
        yield str(item)
