"""TensorRT and TensorRT for RTX behind one name: the same Python API, two products.

``tensorrt`` (11.x) builds engines for data-centre GPUs, ``tensorrt_rtx`` for consumer cards, where it finishes
compiling on the user's GPU. Everything else in loracc is written against the module that this file hands out.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from loracc.errors import InputError, require

__all__ = ["FLAVORS", "TensorRT", "load_flavor"]

#: ``--flavor`` -> import name.
FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
#: Messages of the log that an error quotes.
_QUOTED = 6


@dataclass(frozen=True)
class TensorRT:
    """One flavour, loaded.

    Attributes:
        flavor: "tensorrt" or "rtx".
        module: The Python module.
        logger: Collects what the library says, in place of printing it.
    """

    flavor: str
    module: Any
    logger: Any

    @property
    def version(self) -> str:
        """As the library gives it."""
        return str(self.module.__version__)

    def complaint(self, what: str) -> str:
        """``what``, followed by the library's own last warnings and errors."""
        said = [text for severity, text in self.logger.messages if severity in ("ERROR", "INTERNAL_ERROR")]
        said = said or [text for severity, text in self.logger.messages if severity == "WARNING"]
        return "\n  ".join([what, *said[-_QUOTED:]])


def load_flavor(flavor: str | None) -> TensorRT:
    """Load a flavour; None takes ``tensorrt`` where it is installed, else ``rtx``.

    Raises:
        MissingExtraError: It is not installed; the message names the ``pip install`` line.
        InputError: The name is no flavour.
    """
    if flavor is None:
        flavor = next((name for name, module in FLAVORS.items() if importlib.util.find_spec(module)), "tensorrt")
    if flavor not in FLAVORS:
        raise InputError(f"flavor {flavor!r}: expected one of {', '.join(FLAVORS)}.")
    module = require(FLAVORS[flavor], "build TensorRT engines")
    return TensorRT(flavor, module, _collector(module))


def _collector(module: Any) -> Any:
    class Collector(module.ILogger):  # type: ignore[misc]
        """Failures of TensorRT are return values; why is only ever logged."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity.name, message))

    return Collector()
