"""Targets: what a lowered model is written as."""
