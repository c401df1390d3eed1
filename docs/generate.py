"""Write what the documentation takes from elsewhere: `python docs/generate.py`.

docs/ops.md comes from the docstrings of fastunet.ops, and the blocks of docs/performance.md between markers from
benchmarks/results. With `--pictures FOLDER`, the folder in which the commands of docs/tutorial.md were run, the
tutorial's pictures are written too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE_WIDTH, PICTURE_COLOURS = 800, 128  # small files, in which a curve's labels can still be read

OPS_HEAD = """# Ops

The functions of `fastunet.ops`. Each equals the PyTorch composition that its docstring names, in values, gradients,
dtypes, autocast and NaN. All are `torch.library` ops, so that `torch.compile` takes them into its graphs. Which
implementation runs is decided for each call: [Architecture](architecture.md) tells how, `fastunet.explain` what.

This page is written from the docstrings by `python docs/generate.py`.
"""


# --- ops.md ---


def ops_page() -> str:
    """Return the reference of the public ops: a signature and the docstring of each."""
    from fastunet import ops

    sections = [_section(name, getattr(ops, name)) for name in ops.__all__]
    return "\n".join([OPS_HEAD, *sections])


def _section(name: str, op: Callable[..., Any]) -> str:
    signature = f"{name}{inspect.signature(op)}"
    if len(signature) > 100:
        body = ",\n    ".join(str(parameter) for parameter in _parameters(op))
        signature = f"{name}(\n    {body},\n){signature.rpartition(')')[2]}"
    return f"## {name}\n\n```python\n{_plain(signature)}\n```\n\n{_as_markdown(inspect.getdoc(op) or '')}\n"


def _parameters(op: Callable[..., Any]) -> Iterator[str]:
    parameters = inspect.signature(op).parameters.values()
    is_starred = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not is_starred:
            is_starred = True
            yield "*"
        yield str(parameter)


def _plain(signature: str) -> str:
    """Return a signature without the quotes that annotations have where they are strings."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)


def _as_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: outside of code a star is a star, and the bracket of a tag a bracket."""
    lines = []
    for line in docstring.splitlines():
        parts = [line] if line.startswith("    ") else re.split(r"(`[^`]*`)", line)
        is_code = line.startswith("    ")
        lines.append(
            "".join(part if is_code or part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)
        )
    return "\n".join(lines)


# --- performance.md ---


def performance_page(text: str) -> str:
    """Return the page with its blocks between `<!-- NAME: generated -->` and `<!-- end of NAME -->` written anew."""
    blocks = {"training": accuracy_table, "speed": speed_tables, "slower": losing_cases, "memory": memory_table}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
        first, last = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:first]}\n\n{block()}\n\n{text[last:]}"
    return text


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def accuracy_table() -> str:
    """Return the mean scores of `fastunet train` and of the plain script over their seeds, by what they were given."""
    titles = {
        "accuracy_minutes_4": "20 sections, 4 minutes",
        "accuracy_minutes_4_rare": "cells in 0.3 % of the pixels, 4 minutes",
    }
    lines = [
        "| trained on | seeds | by | Dice, foreground | Dice, background | V-Rand | steps |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for name, title in titles.items():
        found = _load(f"cpu/{name}.json")
        for who in ("plain", "fastunet"):
            mean = found["summary"][who]
            scores = [mean["dice"]["foreground"], mean["dice"]["background"], mean["v_rand"]]
            cells = " | ".join(f"{score:.3f}" for score in scores)
            lines.append(f"| {title} | {len(found['runs'])} | {who} | {cells} | {mean['steps']:.0f} |")
    return "\n".join(lines)


def speed_tables() -> str:
    """Return the tables that the README has too."""
    from fastunet.benchmarks.results import generate

    return generate(RESULTS)


def losing_cases() -> str:
    """Return a line for each net and provider that fastunet is slower than."""
    from fastunet.benchmarks.results import DROP_IN, spread_text

    from fastunet.measuring.timing import Quantiles, ratio

    lines = ["| net | task | faster provider | its time / time of fastunet |", "|---|---|---|--:|"]

    def add(net: str, path: Path, task: str, provider: str, found: Quantiles) -> None:
        if found.median < 1:
            lines.append(f"| {net} (`{path.name}`) | {task} | {provider} | {spread_text(found, digits=2)} |")

    for path in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        settings = result.get("settings", {})
        for task in ("inference", "training"):
            for provider, found in (result.get("summary", {}).get(task) or {}).items():
                net = f"{'-'.join(map(str, settings['features']))}, {settings['dtype']}, {settings['size']} pixels"
                add(net, path, task, provider, Quantiles(found["ratio"], found["p10"], found["p90"], found["rounds"]))
        if path.name.startswith("drop_in_"):
            for row in result["rows"]:
                for other, ours in DROP_IN:
                    if other in row["samples_ms"] and ours in row["samples_ms"]:
                        found = ratio(row["samples_ms"], other, ours)
                        add(row["name"], path, settings["task"], f"{other}, of {ours}", found)
    return "\n".join(lines)


def memory_table() -> str:
    """Return the bytes that are kept and moved for one image, by what computes the net."""
    kept, moved = _load("saved_memory.json")["summary"], _load("traffic.json")
    images = moved["settings"]["batch"]
    rows = [
        ("kept for the backward of a training step", kept["triton"]["bytes"], kept["eager"]["bytes"]),
        (
            "moved in inference",
            moved["summary"]["joined"]["bytes"] / images,
            moved["summary"]["eager"]["bytes"] / images,
        ),
    ]
    lines = ["| MB for each image | Triton kernels | plain PyTorch |", "|---|--:|--:|"]
    return "\n".join([*lines, *(f"| {name} | {a / 1e6:.0f} | {b / 1e6:.0f} |" for name, a, b in rows)])


# --- pictures ---


def write_pictures(folder: Path) -> None:
    """Write the tutorial's pictures from the files that its commands left in `folder`."""
    from PIL import Image

    (DOCS / "pictures").mkdir(exist_ok=True)
    report = Image.open(folder / "RUN" / "report.png").convert("RGB")
    files = [
        folder / "NEW" / "images" / "cell_000.png",
        folder / "LABELS" / "cell_000.png",
        folder / "LABELS" / "cell_000_overlay.png",
    ]
    pictures = [Image.open(file).convert("RGB") for file in files]
    side = PICTURE_WIDTH // len(files)
    row = Image.new("RGB", (side * len(files), side - 8), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture.resize((side - 8, side - 8), Image.Resampling.NEAREST), (index * side, 0))
    report = report.resize((PICTURE_WIDTH, PICTURE_WIDTH * report.height // report.width), Image.Resampling.LANCZOS)
    for name, picture in {"report.png": report, "prediction.png": row}.items():
        picture.quantize(PICTURE_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            DOCS / "pictures" / name, optimize=True
        )


def main() -> None:
    """Write the pages, and on request the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    (DOCS / "ops.md").write_text(ops_page())
    performance = DOCS / "performance.md"
    performance.write_text(performance_page(performance.read_text()))
    if options.pictures is not None:
        write_pictures(options.pictures)


if __name__ == "__main__":
    main()
