"""The `fastunet` command: also `python -m fastunet`."""

from __future__ import annotations

import sys

NEEDED = (
    "accelerate",
    "filelock",
    "kornia",
    "matplotlib",
    "monai",
    "PIL",
    "rich",
    "safetensors",
    "tifffile",
    "typer",
)


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from .cli import app
        from .cli.errors import run_to_the_end

        run_to_the_end(app)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        sys.exit(f"error: the command line needs {error.name}: pip install 'fastunet[train]'")


if __name__ == "__main__":
    main()
