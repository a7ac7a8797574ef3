"""Calibrated rounding: which neighbour each element of a fold goes to is chosen on the inputs that a model sees."""
