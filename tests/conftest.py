"""What every test begins with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastunet import dispatch


@pytest.fixture(autouse=True)
def _no_remembered_choices() -> Iterator[None]:
    """Choices are remembered as if the device never changed: tests that put another in its place change it."""
    dispatch._choices.clear()
    yield
    dispatch._choices.clear()


@pytest.fixture
def layers_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers and nets are computed like large ones, which would take the tests longer."""
    for limit in ("_FEW_PRODUCTS", "_FEW_PRODUCTS_OF_TWO", "_SMALL_PRODUCTS"):
        monkeypatch.setattr(dispatch, limit, 0)
