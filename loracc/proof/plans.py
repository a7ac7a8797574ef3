"""Two TensorRT plans of one graph: what differs between them, outside the weights?

The proof needs no GPU and loads neither plan. Each plan's manifest says where its weights lie; that is checked against
the digests in it, and then every byte that is not a weight's is compared.

One thing must be explained and not only found: the builder stores equal constants once. A base in which two weights are
equal, and which an adapter makes different, gives a larger plan, and the two cannot be laid side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loracc.devices import gpu_name
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError
from loracc.proof.verdict import EndToEnd, Latency, Numbers, Structure, Verdict, Verification, Weights
from loracc.targets.tensorrt_load import load_engine
from loracc.targets.tensorrt_manifest import PLANS, Manifest, read_engine
from loracc.targets.tensorrt_places import Place, seen

__all__ = ["PlanDifference", "are_plans", "compare_plans", "verify_plans"]

_SHOWN = 8
_DIGESTS = "two plans' weights are compared by digest; verify the ONNX files for numbers"
_NUMBERING = (
    "the builder orders some tensors by their addresses in memory: "
    "build-trt --like BASE.engine repeats the build at others until it has the base's order"
)
_REPEATS = "where both engines were built with --repeats 3 or more, and alike, a difference is a failure"
_NOT_RUN = "the engines are not run: verify the ONNX files that they were built from"


@dataclass(frozen=True)
class PlanDifference:
    """What was found.

    Attributes:
        verdict, reason: Of the structure.
        changed: Weights whose bytes differ.
        outside: Bytes that differ and are no weight's; None where the plans cannot be laid side by side.
        inside: Bytes that differ inside weights.
        bytes: Sizes of the two plans.
        notes: What the reader must know.
        layers: What the inspector's lists of layers say, or why they were not read.
        again: Another build may be equal: all that differs lies outside weights whose places are known.
    """

    verdict: Verdict
    reason: str
    changed: tuple[str, ...] = ()
    outside: int | None = None
    inside: int = 0
    bytes: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    again: bool = False
    layers: str = ""


def are_plans(base: str | Path, out: str | Path, adapters: Sequence[object] = ()) -> bool:
    """Whether both are engines, to be compared as such.

    Raises:
        InputError: One is and the other is not, one is missing, or an adapter is given with them.
    """
    paths = Path(base), Path(out)
    plans = [path for path in paths if path.suffix.lower() in PLANS]
    if not plans:
        return False
    if len(plans) == 1:
        raise InputError(
            f"{plans[0]}: an engine, and the other is none. Plans are compared with plans of the same TensorRT.",
            hint="Build one of the base: loracc build-trt BASE.onnx -o BASE.engine, with the same options.",
        )
    if adapters:
        raise InputError(
            "--adapter says nothing about two engines: what was folded is in their manifests.",
            hint="Leave it out here, and verify the ONNX files with it.",
        )
    return True


def verify_plans(base: Path, out: Path, *, latency: bool = False) -> Verification:
    """The verdicts on two engines.

    Args:
        base, out: The engines.
        latency: Asked for; engines are timed by ``bench``.

    Raises:
        InputError: A plan has no manifest, or is not what the manifest describes.
    """
    found = _with_layers(compare_plans(base, out), base, out)
    nothing = found.verdict == "pass" and not found.changed
    weights = Weights("fail", "no weight differs: nothing was folded") if nothing else Weights("skipped", _DIGESTS)
    structure = Structure(
        found.verdict,
        found.reason,
        (found.reason,) if found.reason else (),
        optimized_reason="a plan is what the optimizer left",
        compared=_facts(found),
    )
    asked = "engines are timed with loracc bench, on a GPU" if latency else "not asked for"
    return Verification(
        Numbers(weights, EndToEnd("skipped", _NOT_RUN)), structure, Latency("skipped", asked), found.notes
    )


def _with_layers(found: PlanDifference, base: Path, out: Path) -> PlanDifference:
    """What was found, and what the inspector says of the layers where there is a GPU to load the engines."""
    if gpu_name() is None:
        return replace(found, layers="the inspector's layer lists: skipped, no GPU")
    try:
        one, two = (load_engine(path, "list an engine's layers").layers() for path in (base, out))
    except LoraccError as error:
        return replace(found, layers=f"the inspector's layer lists: skipped, {error.message}")
    if one == two:
        return replace(found, layers=f"{len(one)} layers alike in type, tactic, shapes and formats")
    first = next(
        (n for n, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
    )
    reason = f"the inspector lists {len(one)} and {len(two)} layers, of which number {first} is the first to differ"
    return replace(found, verdict="fail", reason=f"{reason}; {found.reason}" if found.reason else reason)


def compare_plans(base: Path, out: Path) -> PlanDifference:
    """Compare two engines that loracc built; neither is loaded.

    Raises:
        InputError: See :func:`verify_plans`.
    """
    read = read_engine(base), read_engine(out)
    manifests, plans = (read[0][0], read[1][0]), (read[0][1], read[1][1])
    sizes = len(plans[0]), len(plans[1])
    if reason := _differently_built(*manifests):
        return PlanDifference("fail", reason, bytes=sizes)
    one, two = (manifest.weights for manifest in manifests)
    changed = tuple(name for name in one if one[name].sha256 != two[name].sha256)
    marked = manifests[1].options["marked"]
    if marked and (strange := sorted(set(changed) - set(marked))):
        return PlanDifference(
            "fail", f"changed, and no adapter was folded into: {_some(strange)}", changed, bytes=sizes
        )
    if sizes[0] != sizes[1]:
        return _explained(manifests, changed, sizes)
    arrays = [np.frombuffer(plan, np.uint8) for plan in plans]
    differ = arrays[0] != arrays[1]
    left, lost = _outside(manifests, arrays, differ, changed)
    outside = int(np.count_nonzero(left))
    found = PlanDifference("pass", "", changed, outside, int(np.count_nonzero(differ)) - outside, sizes)
    if not outside:
        return found
    notes = (f"not stored in the plans as they are: {_some(lost)}",) if lost else ()
    what = f"{outside:,} bytes differ outside the weights"
    if lost:
        reason = f"{what}, and {len(lost)} changed weights could not be located in the plans, which may be why"
        return _with(found, "inconclusive", reason, notes)
    if known := next((one.repeats for one in manifests if one.repeats.get("differ")), None):
        reason = (
            f"{what}, but {known['builds']} builds of one of these very models differ in {known['differ']:,} from one "
            "another, so this comparison cannot tell"
        )
        return replace(_with(found, "inconclusive", reason, (_NUMBERING,)), again=True)
    what = f"{what}, the first at {int(np.argmax(left)):,}"
    if not manifests[0].memory or manifests[0].memory != manifests[1].memory:
        reason = f"{what}, but the two builds were not at the same addresses, so this comparison cannot tell"
        return replace(_with(found, "inconclusive", reason, (_NUMBERING,)), again=True)
    if not all(one.repeats.get("builds", 1) > 1 for one in manifests):
        reason = f"{what}, and an order of tensors that one build in many has could be why, so this cannot tell"
        return replace(_with(found, "inconclusive", reason, (_NUMBERING, _REPEATS)), again=True)
    reason = f"{what}, and repeated builds of both models are equal"
    return replace(_with(found, "fail", reason, (_NUMBERING,)), again=True)


def _with(found: PlanDifference, verdict: Verdict, reason: str, notes: tuple[str, ...]) -> PlanDifference:
    return PlanDifference(verdict, reason, found.changed, found.outside, found.inside, found.bytes, notes)


def _differently_built(one: Manifest, two: Manifest) -> str:
    """Why the two were never going to be equal; empty when nothing speaks against it."""
    for what in ("flavor", "version", "gpu", "profiles"):
        if getattr(one, what) != getattr(two, what):
            return f"built with another {what}: {getattr(one, what)} and {getattr(two, what)}"
    for name in one.options:
        if name != "marked" and one.options[name] != two.options.get(name):
            return f"built with another {name}: {one.options[name]} and {two.options.get(name)}"
    if one.options["refittable"] == "adapter" and one.options["marked"] != two.options["marked"]:
        return "built with other weights marked refittable"
    if one.weights.keys() != two.weights.keys():
        return f"built from graphs with other weights: {_some(sorted(one.weights.keys() ^ two.weights.keys()))}"
    if one.graph_sha256 != two.graph_sha256:
        return "built from different graphs (their nodes, names, shapes or types differ)"
    return ""


def _explained(
    manifests: tuple[Manifest, Manifest], changed: tuple[str, ...], sizes: tuple[int, int]
) -> PlanDifference:
    """The plans' lengths differ: does the builder's storing equal constants once account for it?"""
    pairs = list(_equal_on_one_side(manifests))
    lengths = f"the plans have {sizes[0]:,} and {sizes[1]:,} bytes"
    if not pairs:
        return PlanDifference("fail", lengths, changed, bytes=sizes)
    shown = "; ".join(f"{' = '.join(names)} in the {side}" for names, side in pairs[:_SHOWN])
    reason = (
        f"{lengths}. TensorRT stores equal constants once, and these are equal on one side only: {shown}. The "
        "layout differs for that reason, so the bytes cannot be laid side by side"
    )
    note = "compare with a base whose equal weights differ, or the layers with the inspector on a GPU"
    return PlanDifference("inconclusive", reason, changed, bytes=sizes, notes=(note,))


def _equal_on_one_side(manifests: tuple[Manifest, Manifest]) -> Iterator[tuple[tuple[str, ...], str]]:
    for manifest, other, side in zip(manifests, reversed(manifests), ("base", "output"), strict=True):
        groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
        for name, weight in manifest.weights.items():
            groups.setdefault((weight.sha256, weight.dtype, tuple(weight.shape)), []).append(name)
        for names in groups.values():
            if len(names) > 1 and len({other.weights[name].sha256 for name in names}) > 1:
                yield tuple(names), side


def _outside(
    manifests: tuple[Manifest, Manifest], plans: list[Array], differ: Array, changed: tuple[str, ...]
) -> tuple[Array, list[str]]:
    """(the bytes that differ outside the changed weights, the changed weights that lie elsewhere in one plan)."""
    left, lost = differ.copy(), []
    for name in changed:
        places = manifests[0].weights[name].places
        views = seen(places, left) if places == manifests[1].weights[name].places else []
        if not views or not _hold(manifests, plans, name, places):
            lost.append(name)
            continue
        for view in views:
            view[...] = False
    return left, lost


def _hold(manifests: tuple[Manifest, Manifest], plans: list[Array], name: str, places: Sequence[Place]) -> bool:
    """Whether both plans have at these places what their manifests say."""
    for manifest, plan in zip(manifests, plans, strict=True):
        data = np.concatenate(seen(places, plan), axis=1)
        if hashlib.sha256(data.data).hexdigest() != manifest.weights[name].sha256:
            return False
    return True


def _facts(found: PlanDifference) -> str:
    """In words, for the report."""
    if found.outside is None:
        return found.layers
    return (
        f"{len(found.changed)} weights differ; of {found.bytes[0]:,} bytes {found.inside:,} differ inside them, "
        f"{found.outside:,} outside; {found.layers}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
