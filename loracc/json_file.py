"""JSON files that come with models and adapters: configurations and indices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loracc.errors import InputError

__all__ = ["read_json", "read_json_object"]


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error}).", hint="Fetch the file again.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, which is one object.

    Raises:
        InputError: It cannot be read, is not JSON, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}, expected an object.")
    return value
