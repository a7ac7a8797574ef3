"""What ``native/kernels.c`` offers; the module is there only where it could be built."""

from loracc.dtypes import Array

INTERFACE: int

def width(stored: str, sums: str, /) -> int: ...
def fold(
    stored: str,
    sums: str,
    weight: Array,
    offset: int,
    rows: int,
    columns: int,
    stride: int,
    left: Array,
    packed: Array,
    rank: int,
    /,
) -> bool: ...
