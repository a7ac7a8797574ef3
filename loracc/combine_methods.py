"""The names that ``--combine`` takes; alone, so that the command line knows them without loading anything."""

from __future__ import annotations

__all__ = ["METHODS", "ON_DELTAS", "ON_FACTORS"]

#: Methods that combine A with A and B with B.
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
#: Methods that combine the deltas and cut the result to a rank: what each does to the deltas.
ON_DELTAS = {
    "svd": "linear",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
}
#: What ``--combine`` takes.
METHODS = ("linear", "cat", "svd", "ties", "dare", *ON_FACTORS[2:], *list(ON_DELTAS)[1:])
