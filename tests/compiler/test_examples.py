"""Every script in examples/ runs, learns, and gives what the plain model gives."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastunet.compiler import backend

EXAMPLES = sorted(p for p in (Path(__file__).parents[2] / "examples").glob("*.py") if p.stem != "shapes")


def run(path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(path.parent))
    found = runpy.run_path(str(path))["main"](**arguments)
    torch.testing.assert_close(found["result"], found["expected"], rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In short, with eager in inductor's place, whose compiling takes longer than the example."""
    found: list[Any] = []
    replace = backend.replace_patterns
    monkeypatch.setattr(
        backend, "replace_patterns", lambda *args, **options: found.extend(new := replace(*args, **options)) or new
    )
    short = {"rounds": 1} if path.stem == "milesial_checkpoint" else {"steps": 1}
    run(path, monkeypatch, options={"fallback": "eager"}, size=32, **short)
    assert any(pattern.is_replaced for pattern in found)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_as_it_stands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(path, monkeypatch)
    if "losses" in found:
        assert found["losses"][-1] < 0.8 * found["losses"][0]


def test_there_are_five_with_one_changed_line_each() -> None:
    texts = [path.read_text() for path in EXAMPLES]
    assert len(texts) == 5
    assert all(text.count('backend="fastunet"') == text.count("# the one changed line") == 1 for text in texts)
