"""What all tests of the drop-in backend need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from fastunet.benchmarks.dropin_models import find_packages

find_packages()


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    """Each test compiles anew."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def packages_deprecations() -> Iterator[None]:
    """What other packages' models do in their ways is not ours to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture(autouse=True)
def _small_nets_run_the_ops(layers_of_any_size: None) -> None:
    """All nets here are small, and are to run what large ones do."""
