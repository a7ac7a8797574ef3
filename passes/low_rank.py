"""Is a weight-only expression of low rank: told by what it is made of, else by its numbers."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.passes.constant_values import Constants, is_onnx, plain_tensor

__all__ = ["has_full_rank", "has_low_rank_product", "low_rank_factors"]

#: Singular values below this part of the largest count as rounding of a float32 computation.
_NOISE = 1e-5
_MOST_NODES = 64


def has_low_rank_product(value: ir.Value, constants: Constants) -> bool:
    """Whether a constant is computed from a product of two weights that is narrower inside than its result."""
    seen: set[ir.Node] = set()
    stack = [value]
    while stack and len(seen) < _MOST_NODES:
        current = stack.pop()
        node = current.producer()
        if node is None or node in seen or plain_tensor(current) is not None or not is_onnx(node):
            continue
        seen.add(node)
        if _is_narrow(node, constants):
            return True
        stack.extend(v for v in node.inputs if v is not None)
    return False


def _is_narrow(node: ir.Node, constants: Constants) -> bool:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return False
    first, second = (constants.shape(v) for v in node.inputs[:2] if v is not None)
    result = constants.shape(node.outputs[0])
    if node.op_type == "Conv":
        inner, sides = math.prod(second[1:]), (second[0], math.prod(result[2:]))
    elif len(first) < 2 or len(second) < 2:
        return False
    else:
        turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
        inner = first[-2] if turned else first[-1]
        sides = (result[-2], result[-1])
    return inner < min(sides)


def has_full_rank(matrix: Array) -> bool:
    """Whether no factorization narrower than the matrix exists, up to float32 noise."""
    return low_rank_factors(matrix) is None


def low_rank_factors(matrix: Array) -> tuple[Array, Array] | None:
    """``(left [n, r], right [r, m])`` with ``left @ right`` the matrix up to float32 noise, r < min(n, m); else None.

    A randomized range finder (Halko, Martinsson & Tropp 2011, algorithm 4.2) with a fixed seed, doubled until it holds
    the matrix: a matrix of rank r costs products with about 2r vectors, not a decomposition.
    """
    n, m = matrix.shape
    least, size = min(n, m), float(np.linalg.norm(matrix))
    if size == 0.0:
        return np.zeros((n, 1)), np.zeros((1, m))
    random = np.random.default_rng(0)
    width = min(32, least)
    while True:
        basis, _ = np.linalg.qr(matrix @ random.standard_normal((m, width)))
        inside = basis.T @ matrix  # [width, m]
        if float(np.linalg.norm(matrix - basis @ inside)) <= _NOISE * size:
            break
        if width == least:  # cannot be: a basis of the whole space holds everything
            return None
        width = min(2 * width, least)
    u, s, vt = np.linalg.svd(inside, full_matrices=False)
    rank = int(np.sum(s > _NOISE * s[0]))
    if rank >= least:
        return None
    return (basis @ u[:, :rank]) * s[:rank], vt[:rank]
