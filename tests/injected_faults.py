"""Copies of the kernels package with one mutation in them: a test suite worth its name catches each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastunet.kernels import gpu


@contextmanager
def kernels_with(bug: tuple[str, str, str], folder: Path) -> Iterator[str]:
    """The name of an importable copy of the kernels package with (module, fragment, mutation) injected."""
    module, fragment, mutation = bug
    package = f"kernels_with_{folder.name}"
    (folder / package).mkdir()
    for file in Path(gpu.__file__).parent.glob("*.py"):
        text = file.read_text()
        if file.stem == module:
            assert fragment in text, f"{module}.py no longer holds {fragment!r}"
            text = text.replace(fragment, mutation)
        (folder / package / file.name).write_text(text.replace("fastunet.kernels", package))
    sys.path.insert(0, str(folder))
    try:
        yield package
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
