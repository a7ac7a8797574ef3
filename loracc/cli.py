"""The command line: it parses, calls the Python API and prints; nothing is computed here."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence

import click

from loracc.commands.attach import attach
from loracc.commands.bench import bench
from loracc.commands.build_trt import build_trt
from loracc.commands.convert import convert
from loracc.commands.extract import extract
from loracc.commands.fold import fold
from loracc.commands.github import announce_refusal
from loracc.commands.inspect import inspect
from loracc.commands.refit_trt import refit_trt
from loracc.commands.slot import slot
from loracc.commands.terminal import printable
from loracc.commands.unfold import unfold
from loracc.commands.verify import verify
from loracc.errors import CheckFailed, InputError, LoraccError
from loracc.interrupts import interrupt

__all__ = ["main", "run"]

INTERRUPTED = 130
#: What a disk, a path or a system's limit is to blame for, wherever it comes up.
_SURROUNDINGS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENFILE,
        errno.EIO,
        errno.ESTALE,
    }
)
_LESS_MEMORY = "Smaller inputs (--inputs, --input) take less; --no-verify does not run the model at all."

_EPILOG = """\b
Examples:
  loracc fold model.pt2 adapter/ -o out.onnx
  loracc fold hf_folder/ style=a.safetensors@0.7 task=b/ -o merged/
  loracc verify model.pt2 out.onnx --adapter adapter/
  loracc inspect adapter/

Exit codes: 0 done, 1 a check said no, 2 the input or the call is wrong, 130 interrupted."""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loracc", prog_name="loracc")
def main() -> None:
    """A compiler for LoRA-adapted models: fold adapters into the weights, export, and prove what came out."""


for _command in (fold, attach, slot, verify, unfold, bench, inspect, convert, extract, build_trt, refit_trt):
    main.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    A user's error is one paragraph on stderr (and, with ``--json``, an ``error`` object on stdout). Our own bugs keep
    their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)  # a kill cleans up like Ctrl-C
    try:
        code = main.main(args=arguments, prog_name="loracc", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.Abort:  # click's name for Ctrl-C
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LoraccError as error:
        _show(error, as_json="--json" in arguments)
        if isinstance(error, CheckFailed):
            announce_refusal(error)
        return error.exit_code
    except BrokenPipeError:  # `loracc inspect ... | head`
        _give_up_stdout()
        return INTERRUPTED
    except MemoryError as error:
        text = f"not enough memory{f' ({error})' if str(error) else ''}."
        _show(InputError(text, hint=_LESS_MEMORY), as_json="--json" in arguments)
        return InputError.exit_code
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        where = os.fsdecode(error.filename or "standard output")
        if error.filename is None:
            _give_up_stdout()
        _show(InputError(f"{where}: {error.strerror}."), as_json="--json" in arguments)
        return InputError.exit_code


def _give_up_stdout() -> None:
    """What is left in its buffer must go somewhere, or Python complains at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(error: LoraccError, *, as_json: bool) -> None:
    click.echo(printable(f"loracc: error: {error.message}"), err=True)
    if error.hint:
        click.echo(printable(error.hint), err=True)
    if as_json:
        body = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        found = {"verification": error.verification} if isinstance(error, CheckFailed) else {}
        try:
            click.echo(json.dumps({"error": body, **found}))
        except OSError:  # nobody can be told: the exit code says it
            _give_up_stdout()


def _interrupted() -> int:
    from loracc.staging import WRITTEN  # where nothing was staged nothing was written

    done = f"{WRITTEN[-1]} was written before that" if WRITTEN else "the destination is as it was"
    click.echo(printable(f"loracc: interrupted; {done}."), err=True)
    return INTERRUPTED
