"""Which of the formats that are zip archives one is, by the names in its directory."""

from __future__ import annotations

import zipfile
from pathlib import Path

from loracc.errors import InputError

__all__ = ["sniff_zip"]


def sniff_zip(path: Path) -> str:
    """ "exported_program", "torchscript" or "pickle".

    Raises:
        InputError: The archive is damaged, or holds something else.
    """
    inside = _names(path)
    if any(name.startswith("models/") and name.endswith(".json") for name in inside):
        return "exported_program"
    if "serialized_exported_program.json" in inside:  # torch.export.save before 2.7
        return "exported_program"
    if "archive_format" in inside:
        raise InputError(
            f"{path}: a .pt2 archive without an exported program (an AOTInductor package holds machine code).",
            hint="Save the program itself: torch.export.save(program, path).",
        )
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "torchscript"
    if "data.pkl" in inside:
        return "pickle"
    raise InputError(f"{path}: {_other(inside)}.", hint="loracc takes .pt2 and .pt archives as torch writes them.")


def _names(path: Path) -> frozenset[str]:
    """Member names, with and without the one folder that torch puts everything into."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError) as error:
        raise InputError(
            f"{path}: a zip archive (.pt, .pt2) whose directory cannot be read ({error}).",
            hint="The file is truncated or damaged: fetch or save it again.",
        ) from error
    return frozenset(names) | frozenset(name.partition("/")[2] for name in names)


def _other(inside: frozenset[str]) -> str:
    if not any(inside):
        return "an empty zip archive"
    if any(name.endswith(".npy") for name in inside):
        return "NumPy arrays (.npz), which are inputs and no model; did you mean --inputs?"
    if "model.weights.h5" in inside:
        return "a Keras model"
    return f"a zip archive that is no model (it holds {', '.join(sorted(filter(None, inside))[:3])}, ...)"
