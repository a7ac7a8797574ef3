"""loracc: a compiler for LoRA-adapted models."""
