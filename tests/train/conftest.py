"""What all tests of training need."""

from __future__ import annotations

import pytest


def pytest_pycollect_makemodule() -> None:
    """Skip all of them where they could not be imported."""
    pytest.importorskip("kornia", reason="needs the extra train")


@pytest.fixture(autouse=True)
def _undrawn(undrawn_reports: None) -> None:
    """Only the session's `run` has a drawn report."""
