"""Delta kinds beyond the LoRA family: one file per family, and the tables that format readers build them from."""
