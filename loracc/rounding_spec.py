"""How a fold is to be rounded, as the user says it: ``--round``, ``--calibrate``, ``--tokenizer``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loracc.errors import InputError

__all__ = ["ROUNDINGS", "RoundingSpec"]

#: ``--round``.
ROUNDINGS = ("nearest", "calibrated")


@dataclass(frozen=True)
class RoundingSpec:
    """What the user asked for.

    Attributes:
        path: Calibration data, a file that is there; None makes inputs up.
        tokenizer: Folder of the tokenizer, where it is not the model's own.
        seed: Of made-up inputs.
    """

    path: Path | None = None
    tokenizer: Path | None = None
    seed: int = 0

    @classmethod
    def of(cls, rounding: str | None, path: str | Path | None, tokenizer: str | Path | None) -> RoundingSpec | None:
        """From the arguments of :func:`loracc.fold`; None for rounding to nearest.

        Raises:
            InputError: Options that contradict each other, or do nothing.
        """
        chosen = rounding or ("calibrated" if path is not None else "nearest")
        if chosen not in ROUNDINGS:
            raise InputError(f"--round {chosen}: expected {' or '.join(ROUNDINGS)}.")
        if chosen == "nearest":
            if path is not None or tokenizer is not None:
                raise InputError("--calibrate and --tokenizer mean nothing with rounding to nearest.")
            return None
        if tokenizer is not None and path is None:
            raise InputError("--tokenizer means nothing without --calibrate FILE.")
        if path is not None and not Path(path).is_file():
            raise InputError(
                f"{path}: no such file.", hint="--calibrate takes an .npz of model inputs, or a text file."
            )
        return cls(Path(path) if path is not None else None, Path(tokenizer) if tokenizer is not None else None)

    def check_target(self, target: str) -> None:
        """Refuse a target that rounds by itself.

        Raises:
            InputError: ``target`` is "exported_program".
        """
        if target == "exported_program":
            raise InputError(
                "calibrated rounding cannot be written as .pt2.", hint="Write an .onnx or a merged checkpoint."
            )

    def said(self, inputs: str) -> dict[str, str]:
        """What an output's record says of it; a verification reads there that no element need be the nearest one.

        Args:
            inputs: Digest of what the model was fed, which depends on the tokenizer, too.

        Raises:
            InputError: The file cannot be read.
        """
        if self.path is None:
            return self._said(f"random inputs, seed {self.seed}", inputs)
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
        return self._said(f"sha256:{digest}", inputs)

    @staticmethod
    def _said(data: str, inputs: str) -> dict[str, str]:
        return {"rounding": "calibrated", "calibration": data, "calibration_inputs": f"sha256:{inputs}"}
