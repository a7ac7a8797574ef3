"""The proof of a deployment: what was written is the base, and every stored variant is it with an adapter folded in.

The same judges as for ``loracc fold`` (:mod:`loracc.proof.verification`), on what a session will be made of: the graph
read back from its file, with the deltas read back from theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loracc.errors import CheckFailed
from loracc.folded import Binding
from loracc.model import BaseModel, LoadOptions
from loracc.passes.encode_weights import encoded
from loracc.proof.structure import compare_graphs
from loracc.proof.verdict import Verification
from loracc.proof.verification import VerifyOptions, verify
from loracc.proof.weights import check_weights
from loracc.runtime.variant_graph import variant_graph
from loracc.sources import load_model
from loracc.targets.onnx_file import write_onnx

__all__ = ["prove_base", "prove_variant"]


def prove_base(base: BaseModel, made: BaseModel) -> None:
    """The written graph is the base's, and every weight has the base's bits.

    Raises:
        CheckFailed: It is not.
    """
    match = compare_graphs(base.ir, made.ir)
    changed = check_weights(base.ir, made.ir, match.pairs, []).changed
    if match.differences or changed:
        found = [*match.differences, *(f"{name}: its bytes differ from the base's" for name in changed)]
        raise CheckFailed(
            "the base was not written as it is:\n  " + "\n  ".join(found[:10]),
            verification={"verdict": "fail", "structure": {"verdict": "fail", "differences": found}},
            hint="This is a bug of loracc's; --no-verify writes the output all the same.",
        )


def prove_variant(
    name: str, base: BaseModel, made: BaseModel, bindings: Sequence[Binding], stored: Sequence[Binding]
) -> Verification:
    """Judge one variant.

    Args:
        name: The variant.
        base: The original model.
        made: The written base.
        bindings: The adapter's deltas at the original's sites.
        stored: The same, read back from the variant's file.

    Raises:
        CheckFailed: A check said no.
    """
    graph = variant_graph(made.ir, made.sites, stored)
    if encoded(graph) is graph:
        # Not "onnx": what is judged is this graph, and not the file that it was made from.
        result = verify(base, replace(made, ir=graph, format="variant"), bindings, VerifyOptions())
    else:  # new codes are judged as they are read back from a file
        with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
            file = Path(folder) / "variant.onnx"
            write_onnx(graph, file)
            result = verify(base, load_model(file, LoadOptions()), bindings, VerifyOptions())
    if result.verdict == "fail":
        raise CheckFailed(
            f"variant {name!r} did not pass its verification, and nothing was written.\n{result.summary()}",
            verification=result.to_json(),
            hint="An adapter that changes nothing was not trained, or is the wrong file. Anything else is a bug of "
            "loracc's, unless the weights are at their numeric limits; --no-verify writes the output all the same.",
        )
    return result
