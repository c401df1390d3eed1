"""Copies of the kernels package with one mutation in them: a test suite worth its name catches each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastunet.kernels import gpu


@contextmanager
def kernels_with(bug: tuple[str, str, str], folder: Path) -> Iterator[str]:
    """The name of an importable copy of the kernels package with (module, fragment, mutation) injected.

    The module is named within the package: "conv3x3.grad".
    """
    module, fragment, mutation = bug
    package = f"kernels_with_{folder.name}"
    shutil.copytree(Path(gpu.__file__).parent, folder / package)
    for file in (folder / package).rglob("*.py"):
        text = file.read_text()
        if file == (folder / package / module.replace(".", "/")).with_suffix(".py"):
            assert fragment in text, f"{file} no longer holds {fragment!r}"
            text = text.replace(fragment, mutation)
        file.write_text(text.replace("fastunet.kernels", package))
    sys.path.insert(0, str(folder))
    try:
        yield package
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
