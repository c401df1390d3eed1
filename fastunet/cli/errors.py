"""How the command line ends: what the user can mend, or the system refuses, is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from fastunet.checks import FastUNetError, Interrupted

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def run_to_the_end(app: typer.Typer) -> NoReturn:
    """Run the app: what the user can mend, or the system refuses, ends as one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are not always text
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except (SystemExit, BrokenPipeError) as end:
        if BrokenPipeError not in (type(end), type(end.__context__)):
            raise
        # Whoever read the output, `head` say, has seen enough.
        _silence()
        code = 0
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except Exception as error:
        message = _in_one_line(error)
        if message is None:
            raise
        fail(message, INTERRUPTED if isinstance(error, Interrupted) else BAD_INPUT)
    sys.exit(code if isinstance(code, int) else 0)


def _in_one_line(error: Exception) -> str | None:
    """What to tell the user; None of an error that is ours to mend."""
    lines = str(error).strip().splitlines()
    # Of an error in a process that reads images the loader makes a traceback, which ends with it.
    text = lines[-1] if "Original Traceback" in str(error) else " ".join(lines)
    if isinstance(error, FastUNetError):
        return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    if isinstance(error, typer.Abort):
        return "aborted"
    if hasattr(error, "format_message"):  # a wrong option or argument
        return " ".join(error.format_message().split())
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else f"output: {text}"
    import torch  # loaded by now: only a command at work gets here

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"not enough memory ({text or type(error).__name__}): take smaller batches, crops or tiles"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"a process that reads images has died, perhaps for lack of memory: take fewer workers ({text})"
    return None


def fail(message: str, code: int) -> NoReturn:
    """Print the error as one line, and exit."""
    # Plain print: rich would wrap the line and colour the numbers in file names, which may hold newlines.
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    _silence()
    sys.exit(code)


def _silence() -> None:
    """Send the rest of the output nowhere: Python, at its end, would fail once more on a full disk or a closed pipe."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
