"""TensorRT and TensorRT for RTX behind one name: the same Python API, two products.

``tensorrt`` (11.x) builds engines for data-centre GPUs, ``tensorrt_rtx`` for consumer cards, where it finishes
compiling on the user's GPU. Everything else in loracc is written against the module that this file hands out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracc.errors import InputError, UnsupportedError, require
from loracc.targets.tensorrt_worker import collector

__all__ = ["FLAVORS", "TensorRT", "complaint", "load_flavor"]

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
        return complaint(what, self.logger.messages)


def complaint(what: str, messages: Sequence[tuple[str, str]]) -> str:
    """``what``, followed by the last of the errors among (severity, text), or of the warnings where there are none."""
    said = [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
    said = said or [text for severity, text in messages if severity == "WARNING"]
    return "\n  ".join([what, *said[-_QUOTED:]])


def load_flavor(flavor: str | None) -> TensorRT:
    """Load a flavour; None takes ``tensorrt`` where it is installed, else ``rtx``.

    Raises:
        MissingExtraError: It is not installed; the message names the ``pip install`` line.
        UnsupportedError: It is installed and does not load.
        InputError: The name is no flavour.
    """
    if flavor is None:
        flavor = next((name for name, module in FLAVORS.items() if importlib.util.find_spec(module)), "tensorrt")
    if flavor not in FLAVORS:
        raise InputError(f"flavor {flavor!r}: expected one of {', '.join(FLAVORS)}.")
    try:
        module = require(FLAVORS[flavor], "build TensorRT engines")
    except (ImportError, OSError) as error:  # a shared library that it links is missing, or is another version
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UnsupportedError(
            f"{FLAVORS[flavor]} is installed and cannot be loaded: {why}.",
            hint=f"Reinstall it: pip install --force-reinstall {FLAVORS[flavor].replace('_', '-')}",
        ) from error
    return TensorRT(flavor, module, collector(module))
