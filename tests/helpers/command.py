"""The `fastunet` command, run in the tests' own process."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastunet.__main__ import main


def fastunet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported everything already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fastunet", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(["fastunet", *map(str, arguments)], code, out.getvalue(), err.getvalue())
