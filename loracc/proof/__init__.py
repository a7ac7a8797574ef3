"""The proof that an output is what was asked for: numbers, structure, latency, and the verdict on them."""
