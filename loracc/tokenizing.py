"""Text as a model's own tokenizer sees it: reading it, a sample a line, and finding the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracc.errors import InputError, require
from loracc.model import BaseModel

__all__ = ["read_lines", "tokenizer_for"]


def read_lines(path: Path) -> list[str]:
    """The lines that hold something.

    Raises:
        InputError: The file cannot be read, is no UTF-8 text, or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).", hint="Give a text file, a sample a line."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path}: no text in it.")
    return lines


def tokenizer_for(model: BaseModel, folder: Path | None) -> Any:
    """The tokenizer in ``folder``, or beside the model; one without a padding token pads with its end.

    Raises:
        InputError: There is none.
        MissingExtraError: transformers is not installed.
    """
    transformers: Any = require("transformers", "tokenize text")
    folder = folder or (model.path if model.path.is_dir() else model.path.parent)
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: no tokenizer can be loaded from it: {str(error).strip().splitlines()[0]}",
            hint="Put the model's tokenizer beside it, or name its folder with --tokenizer DIR.",
        ) from error
    if found.pad_token is None:
        found.pad_token = found.eos_token or found.unk_token
    return found
