"""Variants of a quantized base: the codes that ``loracc fold`` writes, in every scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import loracc
from loracc.runtime import Deployment
from tests.quantizing import SCHEMES, VOCABULARY, adapter, quantized
from tests.runtime.deployments import attach_variants, outputs

#: Schemes whose variants are also verified; all are compared with what a fold writes.
PROVED = ("4 bit, zero points", "QDQ int8 per channel")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_variant_has_the_bits_of_the_folded_model(scheme: str, tmp_path: Path) -> None:
    base = quantized(tmp_path, scheme)
    lora = adapter(tmp_path / "lora")
    result = attach_variants(base, [lora], tmp_path / "out.onnx", verify=scheme in PROVED)
    assert scheme not in PROVED or (result.verification is not None and result.verification.verdict == "pass")
    loracc.fold(base, [lora], tmp_path / "folded.onnx", verify=False)
    feed = {"ids": np.arange(VOCABULARY)}
    with Deployment(tmp_path / "out.onnx") as opened:
        for name in (tmp_path / "out.onnx", tmp_path / "out.onnx.data"):
            name.unlink(missing_ok=True)
        np.testing.assert_array_equal(opened.run("lora", feed)["y"], outputs(tmp_path / "folded.onnx", feed)[0])
        np.testing.assert_array_equal(opened.run(None, feed)["y"], outputs(base, feed)[0])


def test_the_written_base_keeps_its_operators(tmp_path: Path) -> None:
    base = quantized(tmp_path, "4 bit")
    attach_variants(base, [adapter(tmp_path / "lora")], tmp_path / "out.onnx", verify=False)
    kinds = [[node.op_type for node in onnx.load(path).graph.node] for path in (base, tmp_path / "out.onnx")]
    assert kinds[0] == kinds[1]
