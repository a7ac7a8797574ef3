"""``python -m loracc`` and the ``loracc`` script."""

from __future__ import annotations

import gc
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    # What the imports make stays until the end: looking through it again and again takes a tenth of a short run.
    gc.set_threshold(100_000)
    try:
        from loracc.cli import run

        code = run()
    except KeyboardInterrupt:  # before the command line was there to catch it
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
