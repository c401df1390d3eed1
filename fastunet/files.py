"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_SUFFIX = 100  # bytes; longer ones are no format's


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`: moved to it when the block ends, removed when it raises.

    What is moved is on the disk already, and has the permissions of any new file, whatever those its writer chose.
    """
    path = Path(path)
    # Short, since the name of `path` may be as long as the system allows. The suffix stays last: writers choose their
    # format by it.
    suffix = path.suffix if len(os.fsencode(path.suffix)) < LONGEST_SUFFIX else ""
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
