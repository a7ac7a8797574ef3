"""The one exception tree.

::

    LoraccError                what the user can mend; printed as one paragraph, exit code 2
    ├── InputError             a file or an option is wrong (missing, truncated, of another kind, unsafe)
    ├── BindingError           an adapter does not fit the model (unmatched keys, shapes, ambiguity)
    ├── NumericsError          a result would not be finite
    ├── UnsupportedError       understood and refused, with the reason
    └── MissingExtraError      an optional dependency is not installed
    CheckFailed                a check said no; exit code 1

Anything else that escapes is a bug of loracc's own and keeps its traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = [
    "BindingError",
    "CheckFailed",
    "InputError",
    "LoraccError",
    "MissingExtraError",
    "NumericsError",
    "UnsupportedError",
    "combined",
    "require",
    "unwrapped",
]


class LoraccError(Exception):
    """What happened, where, got and expected; ``hint`` says how to mend it."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(LoraccError):
    """A file or an option is wrong."""


class BindingError(LoraccError):
    """An adapter does not fit the model."""


class NumericsError(LoraccError):
    """A folded weight would not be finite, or an adapter is not."""


class UnsupportedError(LoraccError):
    """Understood, and refused with the reason."""


class MissingExtraError(LoraccError):
    """An optional dependency is not installed."""


class CheckFailed(LoraccError):
    """A check said no: not equivalent, structure differs, or slower. ``verification`` is what it found, as JSON."""

    exit_code = 1

    def __init__(self, message: str, *, verification: dict[str, Any], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.verification = verification


def combined(errors: Sequence[LoraccError]) -> LoraccError:
    """One error for several: of their class when they share it, with each message and each hint once.

    >>> str(combined([BindingError("a"), BindingError("b", hint="h")]))
    'a\\nb\\nh'
    """
    if len(errors) == 1:
        return errors[0]
    kinds = {type(error) for error in errors}
    hints = list(dict.fromkeys(error.hint for error in errors if error.hint))
    cls = kinds.pop() if len(kinds) == 1 else InputError
    messages = dict.fromkeys(error.message for error in errors)
    return cls("\n".join(messages), hint="\n".join(hints) or None)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Inside the block a library calls back into loracc, and wraps what is raised there: the user's error comes out.

    onnx_ir computes a folded tensor in the middle of serializing it and raises a ``SerdeError`` from ours.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LoraccError):
            cause = cause.__cause__
        if cause is None or cause is error:
            raise
        raise cause from None


_EXTRA_OF = {
    "onnxruntime": "cpu",
    "torch": "torch",
    "transformers": "hf",
    "tensorrt": "trt",
    "tensorrt_rtx": "rtx",
    "peft": "dev",
    "gguf": "gguf",
    "matplotlib": "report",
}


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency at the edge that needs it.

    Args:
        module: Import name, e.g. ``"onnxruntime"``.
        purpose: What it is needed for, as the end of "... is needed to".

    Raises:
        MissingExtraError: It is not installed; the message names the ``pip install`` line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        extra = _EXTRA_OF.get(root)
        line = f"pip install 'loracc[{extra}]'" if extra else f"pip install {root}"
        raise MissingExtraError(f"{root} is needed to {purpose}, and is not installed.", hint=f"Run: {line}") from error
