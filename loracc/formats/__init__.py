"""Adapter files: each format is only a way to read and write a :class:`loracc.adapter.Adapter`."""
