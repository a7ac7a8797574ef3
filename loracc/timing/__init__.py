"""Timing models beside one another, in one process and in several."""
