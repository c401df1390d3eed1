"""What all tests of data need."""

from __future__ import annotations

import pytest


def pytest_pycollect_makemodule() -> None:
    """Skip all of them where they could not be imported."""
    pytest.importorskip("kornia", reason="needs the extra train")
