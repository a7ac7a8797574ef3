"""What ``native/kernels.c`` offers; the module is there only where it could be built."""

from loracc.dtypes import Array

def width(dtype: str, /) -> int: ...
def fold(
    dtype: str,
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
