"""TensorRT engines: built with adapters folded in memory, and refitted with others."""
