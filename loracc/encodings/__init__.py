"""Weights that a graph stores as integer codes with scales and zero points: read as floats, written as codes again."""
