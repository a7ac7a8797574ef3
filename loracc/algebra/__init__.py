"""Functions of arrays: the formulas that deltas are made of, and what is computed with their matrices."""
