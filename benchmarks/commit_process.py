"""A process in which fastunet and its kernels are those of a given tree, and what measures them those of another.

Wherever fastunet is installed, and if in editable form: a finder that comes before all others answers for it. The
benchmarks, and fastunet.testing with the bounds they judge by, come from the measuring tree, so that two commits are
measured and judged alike; they need of the other tree fastunet.ops, backend, UNet, losses and dispatch.

This file is run by its path, before anything of fastunet can be imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class TreeError(Exception):
    """A tree cannot be measured: it lacks something, or its process ended or hung."""


class TreeFinder(MetaPathFinder):
    """Finds fastunet in `tree`, its benchmarks and testing in `measuring`, and neither anywhere else."""

    def __init__(self, tree: Path, measuring: Path) -> None:
        self._folders = {
            "fastunet": tree / "fastunet",
            "fastunet.kernels": tree / "kernels",
            "fastunet.testing": measuring / "fastunet" / "testing",
            "fastunet.benchmarks": measuring / "benchmarks",
        }
        self._tree = tree

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "fastunet":
            return None
        folder = self._folders.get(fullname)
        if folder is None:
            spec = PathFinder.find_spec(fullname, path)
        else:
            init = folder / "__init__.py"
            spec = spec_from_file_location(fullname, init, submodule_search_locations=[str(folder)])
            spec = spec if init.is_file() else None
        if spec is None:  # None would let the next finder take it from an installed fastunet.
            raise ModuleNotFoundError(f"there is no {fullname} in {self._tree}", name=fullname)
        return spec


class TreeProcess:
    """Calls methods of a `compare_commits.Side` in a process whose fastunet is that of `tree`. A context manager.

    label: what errors call it. settings: a Settings as a dict.
    """

    def __init__(self, label: str, tree: Path, measuring: Path, settings: Mapping[str, Any]) -> None:
        self.label = label
        self._connection, theirs = multiprocessing.Pipe()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed by close
        script = measuring / "benchmarks" / "commit_process.py"
        # -P: the script's folder is not to be searched for modules.
        paths = [str(script), str(theirs.fileno()), str(tree), str(measuring)]
        command = [sys.executable, "-P", *paths, json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the parent, which ends this one.
        )
        theirs.close()  # So that the process's death ends our reading.

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        """What the method returns. TreeError if it raises or takes over `timeout` seconds, or if the process dies."""
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(timeout):
                raise TreeError(f"{self.label}: no answer within {timeout:.0f} s to {method} {arguments}")
            found, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.wait()
            raise TreeError(f"{self.label}: its process ended with exit code {self._said()}") from None
        if error:
            raise TreeError(f"{self.label}: {error}")
        return found

    def _said(self) -> str:
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        return ": ".join([str(self._process.returncode), *last])

    def __enter__(self) -> TreeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._errors.close()


def _serve(connection: Connection, tree: Path, measuring: Path, settings: Mapping[str, Any]) -> None:
    """Answer (method, arguments) with (result, error) until the other end is closed."""
    sys.meta_path.insert(0, TreeFinder(tree, measuring))
    side: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if side is None:
                from fastunet.benchmarks.compare_commits import Side

                side = Side(settings)
            answer = getattr(side, method)(*arguments), ""
        except Exception as error:
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}"
        connection.send(answer)


if __name__ == "__main__":
    _fd, _tree, _measuring, _settings = sys.argv[1:]
    _serve(Connection(int(_fd)), Path(_tree), Path(_measuring), json.loads(_settings))
