"""The `fastunet` command, run in the tests' own process."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastunet.__main__ import main


def fastunet(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported everything already; assert that it ends with that code."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fastunet", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            found = int(end.code or 0)
    assert found == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(["fastunet", *map(str, arguments)], found, out.getvalue(), err.getvalue())


def error_of(*arguments: str | Path) -> str:
    """Run the command, and return the one line by which it refuses them."""
    (line,) = fastunet(*arguments, code=2).stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line
