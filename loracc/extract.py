"""``loracc extract``: the low-rank adapter that turns one checkpoint into another.

ΔW = TUNED − BASE of every weight with two axes or more is approximated by B·A, the truncated singular value
decomposition (Eckart & Young 1936: no product of that rank comes closer), one tensor at a time. What such an adapter
cannot hold is listed with its size, never dropped in silence.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from loracc.adapter import Entry
from loracc.algebra.svd import truncated_svd
from loracc.deltas import LowRank, Replacement
from loracc.dtypes import Array, all_finite, is_float
from loracc.errors import InputError, NumericsError
from loracc.formats.embedding_names import names_embedding
from loracc.formats.tensors import some
from loracc.model import BaseModel, LoadOptions
from loracc.sites import Site
from loracc.tensors import dims, read_rows

if TYPE_CHECKING:
    from loracc.progress import Progress

__all__ = ["ExtractResult", "ExtractedSite", "LeftOut", "extract_adapter"]

#: Rows of a weight that are looked at together.
_ROWS = 4096


@dataclass(frozen=True)
class ExtractedSite:
    """One weight's delta: ‖ΔW‖/‖W‖ (None where W is zero) and what the rank leaves of it, ‖ΔW − B·A‖/‖ΔW‖."""

    name: str
    shape: list[int]
    rank: int
    relative_norm: float | None
    residual: float


@dataclass(frozen=True)
class LeftOut:
    """A difference that is no low-rank delta: with ``full`` it is saved as the whole new parameter."""

    name: str
    shape: list[int]
    relative_norm: float | None
    reason: str
    saved: bool


@dataclass
class ExtractResult:
    """What was extracted.

    Attributes:
        output: The adapter's folder.
        sites: One row per weight that got a delta.
        left_out: Differences that the deltas do not hold.
        residual: ‖difference − adapter‖/‖difference‖ over all parameters together.
        bytes: Size of the adapter.
    """

    output: str
    sites: list[ExtractedSite] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    residual: float = 0.0
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """The contract of ``extract --json``."""
        return asdict(self)


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write the adapter that makes ``tuned`` of ``base``, as PEFT's folder.

    Args:
        base: The original model: a checkpoint, a Hugging Face folder, an ONNX file.
        tuned: The fine-tuned one, of the same kind.
        output: The folder to write.
        rank: Rank of every delta (of a smaller weight its shorter side).
        energy: In place of ``rank``: the part of ‖ΔW‖² to keep, above 0 and up to 1.
        full: Save differences that are no low-rank delta (biases, norms) as whole parameters.
        force: Replace the output if it exists.
        allow_pickle: A ``.pt`` model may run code.
        progress: Told how far it is.

    Raises:
        InputError: The models do not have the same parameters, or do not differ, or the call is wrong.
        NumericsError: A difference is not finite.
    """
    from loracc.formats.write_peft import write_peft
    from loracc.progress import NoProgress
    from loracc.staging import Staging, check_destination

    _check_call(Path(output), rank, energy)
    destination, inputs = Path(output), [Path(base), Path(tuned)]
    check_destination(destination, inputs=inputs, force=force, folder=True)
    pairs = _pairs(*(_load(path, allow_pickle) for path in (base, tuned)))
    work = _Work(rank, energy, full, ExtractResult(str(output)))
    shown = progress or NoProgress()
    shown.begin("extracting", sum(pair.nbytes for pair in pairs))
    for pair in pairs:
        work.one(pair)
        shown.advance(pair.nbytes, pair.site.name)
    shown.end()
    work.finish(base, tuned)
    with Staging(destination, inputs=inputs, force=force, folder=True) as stage:
        work.result.bytes = write_peft(work.entries, stage.path, fan_in_fan_out=work.conv1d)
    return work.result


def _check_call(output: Path, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise InputError("extract needs either --rank or --energy, and not both.", hint="For example --rank 16.")
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank}: expected a positive number.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"--energy {energy:g}: expected a part above 0 and up to 1, such as 0.99.")
    if output.suffix in (".safetensors", ".onnx", ".pt", ".bin"):
        raise InputError(f"{output}: an adapter is written as a folder.", hint=f"Name it {output.with_suffix('')}.")


def _load(path: str | Path, allow_pickle: bool) -> BaseModel:
    """A model's weights under the names that an adapter knows: transformers' where its folder says the class."""
    from loracc.sources import load_model
    from loracc.sources.hf_names import with_module_names

    model = load_model(path, LoadOptions(allow_pickle=allow_pickle, graph=False))
    return (None if model.traced else with_module_names(model)) or model


@dataclass(frozen=True)
class _Pair:
    """One parameter in both models."""

    site: Site
    tuned_site: Site
    base: ir.TensorProtocol
    tuned: ir.TensorProtocol
    traced: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.site.layout.canonical_shape(dims(self.base))

    @property
    def nbytes(self) -> int:
        return int(self.base.nbytes)


def _pairs(base: BaseModel, tuned: BaseModel) -> list[_Pair]:
    """Every parameter of the base with its counterpart; a tied weight once.

    Raises:
        InputError: One of the models has parameters that the other lacks, or of another shape; all of them.
    """
    ours, theirs = (_parameters(model) for model in (base, tuned))
    problems = [f"{name}: only in {base.path}" for name in ours if name not in theirs]
    problems += [f"{name}: only in {tuned.path}" for name in theirs if name not in ours]
    pairs = [
        _Pair(ours[name][0], theirs[name][0], ours[name][1], theirs[name][1], base.traced)
        for name in ours
        if name in theirs
    ]
    for pair in pairs:
        other = pair.tuned_site.layout.canonical_shape(dims(pair.tuned))
        if pair.shape != other:
            problems.append(f"{pair.site.name}: {list(pair.shape)} and {list(other)}")
    if problems:
        raise InputError(
            f"{base.path} and {tuned.path} are not two versions of one model: {some(problems)}.",
            hint="An adapter changes parameters and adds none: a resized vocabulary cannot be extracted.",
        )
    return pairs


def _parameters(model: BaseModel) -> dict[str, tuple[Site, ir.TensorProtocol]]:
    """(site, tensor) by name; of several sites of one weight the first."""
    found: dict[str, tuple[Site, ir.TensorProtocol]] = {}
    seen: set[tuple[str, object]] = set()
    for site in model.sites:
        tensor = model.ir.graph.initializers[site.initializer].const_value
        place = (site.initializer, site.layout)
        if tensor is None or not is_float(tensor.dtype) or not site.name or place in seen:
            continue
        seen.add(place)
        found.setdefault(site.name, (site, tensor))
    return found


class _Work:
    """The loop's state: what was found, and the norms that the whole residual is made of."""

    def __init__(self, rank: int | None, energy: float | None, full: bool, result: ExtractResult) -> None:
        self.rank, self.energy, self.full, self.result = rank, energy, full, result
        self.entries: list[Entry] = []
        self.conv1d = False
        self._differs = self._left = 0.0

    def one(self, pair: _Pair) -> None:
        """Take one parameter's difference apart."""
        if _same(pair):
            return
        name = pair.site.name
        w, new = (site.layout.view(t.numpy()) for site, t in ((pair.site, pair.base), (pair.tuned_site, pair.tuned)))
        delta = _difference(w, new)
        if not all_finite(delta):
            raise NumericsError(f"{name}: the difference of the two models holds inf or NaN.")
        squared, before = _squared(delta), _squared(w)
        self._differs += squared
        relative = math.sqrt(squared / before) if before else None
        if reason := _not_low_rank(pair):
            saved = self.full and pair.site.layout.whole
            if saved:
                whole = Replacement(np.array(pair.tuned.numpy()))
                self.entries.append(Entry(pair.site.module, pair.site.parameter, whole, ()))
            self._left += 0.0 if saved else squared
            self.result.left_out.append(LeftOut(name, list(pair.shape), relative, reason, saved))
            return
        factors, left = self._factors(delta)
        self._left += left
        residual = math.sqrt(left / squared)
        self.result.sites.append(ExtractedSite(name, list(pair.shape), factors.rank, relative, residual))
        site = pair.site
        embedding = site.kind == "embedding" or (site.kind == "other" and names_embedding(site.module))
        self.entries.append(Entry(site.module, "weight", factors, (), fan_in_fan_out=False if embedding else None))
        # A checkpoint's linear weight that lies the other way round is a Conv1D's; a graph's tells nothing.
        self.conv1d |= site.kind == "linear" and bool(site.layout.perm) and not pair.traced

    def _factors(self, delta: Array) -> tuple[LowRank, float]:
        """B = U·√Σ and A = √Σ·Vᵀ in float32, and ‖ΔW − B·A‖² of what was kept."""
        matrix = delta.reshape(delta.shape[0], -1)
        u, s, v = truncated_svd(matrix, self.rank, self.energy)
        root = np.sqrt(s)
        b, a = (u * root).astype(np.float32), (root[:, None] * v).astype(np.float32)
        left = sum(
            _squared(matrix[lo : lo + _ROWS] - b[lo : lo + _ROWS].astype(matrix.dtype) @ a.astype(matrix.dtype))
            for lo in range(0, matrix.shape[0], _ROWS)
        )
        return LowRank(a.reshape(-1, *delta.shape[1:]), b, 1.0), left

    def finish(self, base: str | Path, tuned: str | Path) -> None:
        """The residual of the whole; refuses an adapter that would hold nothing."""
        if not self._differs:
            raise InputError(f"{base} and {tuned} have the same parameters: there is nothing to extract.")
        if not self.result.sites:
            names = some(one.name for one in self.result.left_out)
            raise InputError(
                f"{base} and {tuned} differ only in what is no low-rank delta: {names}.",
                hint="PEFT has no adapter of whole parameters alone.",
            )
        self.result.residual = math.sqrt(self._left / self._differs)


def _not_low_rank(pair: _Pair) -> str:
    """Why a parameter's difference cannot be B·A in a PEFT file; "" where it can."""
    if len(pair.shape) < 2:
        return "one axis"
    if pair.site.kind == "experts" or pair.site.parameter != "weight":
        return f"a raw parameter ({pair.site.parameter}), which PEFT's LoRA layers do not adapt"
    return ""


def _same(pair: _Pair) -> bool:
    if pair.site.layout != pair.tuned_site.layout or dims(pair.base) != dims(pair.tuned):
        return False
    length = dims(pair.base)[0] if dims(pair.base) else 1
    return all(
        np.array_equal(read_rows(pair.base, lo, hi), read_rows(pair.tuned, lo, hi))
        for lo in range(0, length, _ROWS)
        for hi in (min(lo + _ROWS, length),)
    )


def _difference(w: Array, new: Array) -> Array:
    """TUNED − BASE: exact in float64 for float32 weights, float32 for 16-bit ones."""
    wide = np.float32 if max(w.dtype.itemsize, new.dtype.itemsize) == 2 else np.float64
    delta: Array = new.astype(wide)
    delta -= w
    return delta


def _squared(values: Array) -> float:
    """‖values‖², in float64."""
    rows = values.reshape(values.shape[0] if values.ndim else 1, -1)
    return float(sum(np.sum(rows[lo : lo + _ROWS].astype(np.float64) ** 2) for lo in range(0, len(rows), _ROWS)))
