"""Model front ends: whatever comes in becomes a :class:`loracc.model.BaseModel`."""
