"""The `fastunet` command: also `python -m fastunet`."""

from __future__ import annotations

import sys

# Packages of other extras than `train`.
EXTRAS = {"bioimageio": "bioimageio", "onnx": "onnx", "onnxscript": "onnx", "roifile": "imagej"}


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from .cli import app
        from .cli.errors import run_to_the_end

        run_to_the_end(app)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "fastunet"):
            raise
        extra = EXTRAS.get(name, "train")
        sys.exit(f"error: the command line needs {error.name}: pip install 'fastunet[{extra}]'")


if __name__ == "__main__":
    main()
