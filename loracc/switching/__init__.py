"""``attach``: graphs whose deltas can be switched at run time, in the ways that :mod:`loracc.switching.modes` lists."""
