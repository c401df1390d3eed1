"""The documentation says what is so: its tutorial runs, its links lead somewhere, its messages and commands exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="needs the extra train")

import generate
import torch
from command import fastunet
from typer.main import get_command

import fastunet as package
from fastunet import UNet
from fastunet.cli import app
from fastunet.compiler import backend

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OTHER_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
MOST_BYTES_OF_PICTURES = 200_000


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The code blocks of a page, each with its language, in their order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def commands(text: str) -> list[list[str]]:
    """The `fastunet` commands in a block of shell, as lists of words."""
    lines = re.sub(r"\$\w+", "1", text).splitlines()  # a variable stands for a number
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(srun )?fastunet ", line)]
    return [line[line.index("fastunet") + 1 :] for line in words]


def cli_commands() -> dict[str, Any]:
    group: Any = get_command(app)
    return group.commands


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, text in blocks(DOCS / "tutorial.md", "python", "sh"):
        if language == "python":
            exec(text, names)
            continue
        assert len(commands(text)) == len(text.splitlines())
        for words in commands(text):
            fastunet(*words)
    assert names["mask"].shape == (128, 128)
    # The files that its tables name are those that are there.
    tables = re.findall(r"^\| (`[^|]*) \|", prose(DOCS / "tutorial.md"), re.MULTILINE)
    for name in re.findall(r"`([\w.-]+)`", " ".join(tables)):
        folder = "LABELS" if name.startswith("cell_") else "RUN"
        # The last command goes on with the run, and replaces its checkpoint.
        assert (tmp_path / folder / name.replace("000100", "000120")).exists(), name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert page in OTHER_PAGES or DOCS in target.parents, f"{page.name}: {link} leaves the documentation"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_pictures_are_small_and_shown() -> None:
    pictures = [path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg")]
    assert sum(path.stat().st_size for path in pictures) < MOST_BYTES_OF_PICTURES
    shown = {link for page in PAGES for link in links(page)}
    assert {str(path.relative_to(DOCS)) for path in pictures} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_code_is_valid(page: Path) -> None:
    for _, text in blocks(page, "python"):
        if page.name != "ops.md":  # whose blocks are signatures
            compile(text, page.name, "exec")
    for _, text in blocks(page, "sh", "bash"):
        for name, *words in commands(text):
            cli_commands()[name].make_context(name, list(words), resilient_parsing="--help" in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_its_prose_exist(page: Path) -> None:
    parameters = [parameter for each in cli_commands().values() for parameter in each.params]
    known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
    text = prose(page)
    if page.name == "migrating.md":  # the first column has the options of others
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    for option in re.findall(r"`(--[\w-]+)[^`]*`", text):
        assert option in known, f"{page.name}: {option}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_the_names_it_gives_exist(page: Path) -> None:
    """After `import fastunet` alone, but for modules that a page imports itself."""
    for name in re.findall(r"\bfastunet(?:\.[A-Za-z]\w*)+", page.read_text()):
        parts, found = name.split(".")[1:], package
        if importlib.util.find_spec(f"fastunet.{parts[0]}") and parts[0] not in package.__all__:
            found, parts = importlib.import_module(name), []
        for part in parts:
            assert hasattr(found, part), f"{page.name}: {name}"
            found = getattr(found, part)


# Whose errors a user of the command line or of the model meets.
EXPLAINED = ("__main__.py", "checks.py", "cli", "compiler/backend.py", "data", "files.py", "inference", "pretrained.py",
             "segmenter.py", "train", "unet.py")  # fmt: skip
# Of arguments that only the library's own code passes.
INTERNAL = ("module ", "dataset: ", "index: ", "length: ", "…: expected … rows")


def text_of(node: ast.AST) -> str | None:
    """A string in the sources, with an ellipsis for each part that is known only when they run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.strip()
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values).strip()
    return None


def nodes(*folders: str) -> Iterator[ast.AST]:
    for folder in folders:
        path = ROOT / folder
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield from ast.walk(ast.parse(file.read_text()))


def explained() -> list[str]:
    return re.findall(r"^\| `(.*?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def test_the_messages_of_troubleshooting_exist() -> None:
    known = {text_of(node) for node in nodes("fastunet", "kernels")}
    assert not [message for message in explained() if message not in known]
    assert len(explained()) == len(set(explained()))


def test_every_error_has_a_remedy() -> None:
    raised = set()
    for node in nodes(*(f"fastunet/{name}" for name in EXPLAINED)):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name.endswith("Error") or name in ("Interrupted", "BadParameter", "fail", "required", "warn"):
                raised.add(text_of(node.args[0]))
    # A name before the text of another error is no message of its own.
    texts = {text for text in raised if text and len(re.findall(r"\w+", text)) > 1 and not text.startswith(INTERNAL)}
    assert sorted(texts - set(explained())) == []


def test_the_generated_pages_are_up_to_date() -> None:
    remedy = "run `python docs/generate.py`"
    assert (DOCS / "ops.md").read_text() == generate.ops_page(), remedy
    pages = [page.read_text() for page in (ROOT / "README.md", DOCS / "performance.md")]
    assert sorted(re.findall(r"<!-- (\S+): generated -->", "".join(pages))) == sorted(generate.BLOCKS)
    assert pages == [generate.with_blocks(page) for page in (ROOT / "README.md", DOCS / "performance.md")], remedy


MACHINE = {"device": "a device", "torch": "2.13.0", "commit": "abc"}


def tables_of(root: Path, files: dict[str, Any]) -> str:
    for name, value in files.items():
        path = root / "benchmarks/results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return generate.speed_tables(root / "benchmarks/results")


def test_figures_of_speed_come_from_the_files(tmp_path: Path) -> None:
    eager = {"ratio": 1.526, "p10": 1.5, "p90": 1.57}
    settings = {"size": 256, "batch": 1, "threads": 2, "rounds": 15, "features": [2, 4], "dtype": "float16"}
    result = {"environment": MACHINE, "settings": settings, "rows": []}
    inference = {"eager": eager, "compiled": {"ratio": 0.9, "p10": 0.85, "p90": 0.95}}
    samples = {"fastunet": [2.0, 2.0], "fastunet freeze": [1.0, 1.0], "eager": [3.0, 3.0], "compiled": [0.8, 0.8]}
    rows = [{"kind": "net", "name": "inference", "samples_ms": samples}]
    on_cpu = result | {"summary": {"inference": inference, "training": {}}, "rows": rows}
    on_gpu = result | {"summary": {"inference": {"eager": eager}, "training": {"eager": eager}}}
    accuracy = {"cpu/accuracy_steps_400.json": {"plain": {}}}
    assert tables_of(tmp_path, accuracy).count("not measured") == 2
    text = tables_of(tmp_path, {"cpu/unet_cpu.json": on_cpu, "a_gpu/gpu_report.json": on_gpu})
    gpu, cpu = text.split("benchmarks/results/cpu/unet_cpu.json")
    assert "| eager | 1.53 (1.50 to 1.57) | 1.53 (1.50 to 1.57) |" in gpu
    assert "| eager | 1.53 (1.50 to 1.57) | 3.00 (3.00 to 3.00) |\n" in cpu
    assert "| compiled | 0.90 (0.85 to 0.95) | 0.80 (0.80 to 0.80) |" in cpu, "what lost is shown too"
    assert "frozen" not in gpu
    assert "a device, torch 2.13.0; U-Net 2-4, float16, images of 256x256, batches of 1, 2 threads" in text
    assert not re.search("accuracy|not measured", text)


def test_figures_of_other_peoples_models(tmp_path: Path) -> None:
    settings = {"task": "inference", "size": 256, "batch": 1, "width": 32, "rounds": 15, "threads": 2}
    row = {"name": "a net", "found": 5, "replaced": 3, "left": {"too large: why": 2}}
    row["samples_ms"] = {"fastunet": [2.0, 2.0], "eager": [2.0, 3.0]}
    result = {"environment": MACHINE, "settings": settings, "rows": [row]}
    text = tables_of(tmp_path, {"cpu/drop_in_inference.json": result})
    failed = "inductor: failed | eager channels_last and fastunet.compile: failed"
    failed += " | inductor channels_last and fastunet.compile: failed"
    assert f"| a net | 5 | 3 | 2: too large | 1.25 (1.05 to 1.45) | {failed} |" in text
    assert "32 channels in the first level, images of 256x256" in text


def test_the_examples_of_migrating_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "default_fallback", lambda: "eager")  # inductor's compiling takes longer than all else
    torch.save(UNet(1, 2, features=(4, 8)).state_dict(), "checkpoint_epoch5.pth")
    names: dict = {}
    for _, text in blocks(DOCS / "migrating.md", "python"):
        exec(text, names)
    assert names["compiled"](names["x"]).shape == (1, 8, 64, 64)
    assert names["logits"].grad.isfinite().all()


def test_the_example_of_a_training_loop_runs() -> None:
    ((_, text),) = blocks(DOCS / "training.md", "python")
    names: dict = {}
    exec(text.replace("UNet(3, 2)", "UNet(3, 2, features=(4, 8))"), names)
    assert names["loss"].isfinite()
