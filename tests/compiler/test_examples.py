"""Every script in examples/ runs, learns, and gives what the plain model gives."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastunet.compiler import backend
from fastunet.train import results

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOK = FOLDER / "notebook.py"
EXAMPLES = sorted({*FOLDER.glob("*.py")} - {FOLDER / "shapes.py", NOTEBOOK})


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


def test_each_says_what_to_install() -> None:
    for path in [*EXAMPLES, NOTEBOOK]:
        names = re.findall(r"pip install ([^`;(\n\"]+)", path.read_text())
        assert len(names) == 1, path.name
        installed, *others = shlex.split(names[0])
        assert re.fullmatch(r"fastunet(\[train\])?", installed), path.name
        imported = {name.partition(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.M)}
        # What comes with torch, with the extra `train`, with Python, or from the folder itself.
        comes = {"torch", "fastunet", "shapes", *sys.stdlib_module_names}
        comes |= {"monai", "matplotlib"} if installed == "fastunet[train]" else set()
        assert imported - comes <= {other.replace("-", "_") for other in others}, path.name


@pytest.mark.usefixtures("undrawn_reports")
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook runs it, cell by cell, with other parameters after the cell that is tagged for them."""
    pytest.importorskip("matplotlib", reason="needs the extra train").use("agg")
    monkeypatch.setattr(results, "write_report", lambda path, *_: Image.new("RGB", (40, 30)).save(path))
    _, *cells = re.split(r"^# %%(.*)$", NOTEBOOK.read_text(), flags=re.M)
    codes = [code for title, code in zip(cells[::2], cells[1::2], strict=True) if "[markdown]" not in title]
    assert len(codes) == 5
    names: dict[str, Any] = {}
    for number, code in enumerate(codes):
        exec(code, names)
        if number == 0:
            names |= {"count": 5, "size": 32, "minutes": 0.001, "features": (4, 8)}
            names |= {"folder": tmp_path, "data": tmp_path / "data", "run": tmp_path / "run"}
    assert names["mask"].shape == (32, 32)
    assert 0 <= names["metrics"]["mean_dice"] <= 1
    assert len(names["plt"].get_fignums()) == 3
    names["plt"].close("all")


def test_there_are_five_with_one_changed_line_each() -> None:
    texts = [path.read_text() for path in EXAMPLES]
    assert len(texts) == 5
    assert all(text.count('backend="fastunet"') == text.count("# the one changed line") == 1 for text in texts)
