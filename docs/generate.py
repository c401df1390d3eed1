"""Write what the documentation takes from elsewhere: `python docs/generate.py`.

docs/ops.md comes from the docstrings of fastunet.ops, the blocks of README.md and docs/performance.md between markers
from benchmarks/results. With `--pictures FOLDER`, the folder in which the commands of docs/tutorial.md were run, the
tutorial's pictures are written too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastunet.benchmarks.results import markdown, ratio_text, spread_text
from fastunet.benchmarks.tables import conditions

from fastunet import ops
from fastunet.measuring.timing import Quantiles, ratio

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
    sections = [_section(name, getattr(ops, name)) for name in ops.__all__]
    return "\n".join([OPS_HEAD, *sections])


def _section(name: str, op: Callable[..., Any]) -> str:
    signature = f"{name}{inspect.signature(op)}"
    if len(signature) > 100:
        body = ",\n    ".join(_parameters(op))
        signature = f"{name}(\n    {body},\n){signature.rpartition(')')[2]}"
    return f"## {name}\n\n```python\n{_plain(signature)}\n```\n\n{_as_markdown(inspect.getdoc(op) or '')}\n"


def _parameters(op: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(op).parameters.values()
    by_place = [str(each) for each in parameters if each.kind is not each.KEYWORD_ONLY]
    by_name = [str(each) for each in parameters if each.kind is each.KEYWORD_ONLY]
    return [*by_place, "*", *by_name] if by_name else by_place


def _plain(signature: str) -> str:
    """Return a signature without the quotes that annotations have where they are strings."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)


def _as_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: outside of code a star is a star, and the bracket of a tag a bracket."""
    lines = []
    for line in docstring.splitlines():
        if not line.startswith("    "):  # A line of code is kept, as is what stands in backticks.
            line = re.sub(r"(`[^`]*`)|([*<])", lambda found: found[1] or f"\\{found[2]}", line)
        lines.append(line)
    return "\n".join(lines)


# --- README.md and performance.md ---

# Ours by another name: what is prepared once, on a CPU.
FROZEN = "fastunet freeze"
TASKS = {"inference": "inference", "training": "training step"}
# The columns of other people's models: the time of the first over that of the second.
DROP_IN = (
    ("eager", "fastunet"),
    ("inductor", "fastunet"),
    ("eager channels_last", "fastunet.compile"),
    ("inductor channels_last", "fastunet.compile"),
)
# What the README shows of the tables of speed.
README_FILES = ("gpu_report.json", "unet_float32.json")

Result = Mapping[str, Any]


def with_blocks(page: Path) -> str:
    """Return a page with its blocks between `<!-- NAME: generated -->` and `<!-- end of NAME -->` written anew."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{BLOCKS[found[2]]()}\n\n{found[3]}"

    return re.sub(r"(<!-- ([\w-]+): generated -->).*?(<!-- end of \2 -->)", block, page.read_text(), flags=re.DOTALL)


def _load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def accuracy_table() -> str:
    """Return the mean scores of `fastunet train` and of the plain script over their seeds, by what they were given."""
    titles = {
        "accuracy_minutes_4": "20 sections, 4 minutes",
        "accuracy_minutes_4_images_6": "6 of them, 4 minutes",
        "accuracy_minutes_4_rare": "cells in 0.3 % of the pixels, 4 minutes",
    }
    figures = ["seeds", "Dice, foreground", "Dice, background", "V-Rand", "steps"]
    lines = []
    for name, title in titles.items():
        found = _load(f"cpu/{name}.json")
        for who in ("plain", "fastunet"):
            mean = found["summary"][who]
            scores = [mean["dice"]["foreground"], mean["dice"]["background"], mean["v_rand"]]
            cells = [f"{score:.3f}" for score in scores]
            lines.append([title, str(len(found["runs"])), who, *cells, f"{mean['steps']:.0f}"])
    return markdown(["trained on", "seeds", "by", *figures[1:]], lines, right=figures)


def speed_tables(folder: Path = RESULTS, names: Sequence[str] | None = None) -> str:
    """Return a table for each file, GPUs first, or that there is none. names: of those alone."""
    parts: dict[str, list[str]] = {"gpu": [], "cpu": [], "drop-in": []}
    for path in (*sorted(folder.glob("*/gpu_report.json")), *sorted(folder.glob("cpu/*.json"))):
        if names is not None and path.name not in names:
            continue
        result, place = json.loads(path.read_text()), path.relative_to(folder.parents[1])
        if any(result.get("summary", {}).get(task) for task in TASKS):
            parts["gpu" if path.name == "gpu_report.json" else "cpu"].append(_nets(place, result))
        elif path.name.startswith("drop_in_"):
            parts["drop-in"].append(_drop_in(place, result))
    gpu = parts["gpu"] or ["Speed on a GPU: not measured. There is no `benchmarks/results/<gpu>/gpu_report.json`."]
    cpu = parts["cpu"] or ["Speed on a CPU: not measured. There is no file of it in `benchmarks/results/cpu/`."]
    return "\n\n".join([*gpu, *cpu, *parts["drop-in"]])


def _nets(path: Path, result: Result) -> str:
    """Conditions and a table: how many times as long each provider takes."""
    columns = {title: result["summary"].get(task) or {} for task, title in TASKS.items()}
    providers = dict.fromkeys(name for found in columns.values() for name in found)
    lines = [[name, *(ratio_text(found.get(name)) for found in columns.values())] for name in providers]
    if frozen := _of_frozen(result):
        columns["inference, frozen"] = {}
        lines = [[*line, spread_text(frozen[line[0]], digits=2) if line[0] in frozen else ""] for line in lines]
    table = markdown(["time of ... / time of fastunet", *columns], lines, right=columns)
    return f"{_conditions(path, result)}\n\n{table}"


def _of_frozen(result: Result) -> dict[str, Quantiles]:
    """How many times as long as `fastunet.freeze`'s inference each other provider's takes."""
    found = [row["samples_ms"] for row in result["rows"] if (row["kind"], row["name"]) == ("net", "inference")]
    samples = found[0] if found and FROZEN in found[0] else {}
    return {name: ratio(samples, name, FROZEN) for name in samples if name not in ("fastunet", FROZEN)}


def _drop_in(path: Path, result: Result) -> str:
    """Conditions, and by model what is replaced, what is left and why, and how many times as long the others take."""
    names = [f"{other} / {ours}" for other, ours in DROP_IN]
    lines = []
    for row in result["rows"]:
        left = "; ".join(f"{count}: {reason.partition(':')[0]}" for reason, count in row["left"].items())
        ratios = [_drop_in_ratio(row["samples_ms"], *pair) for pair in DROP_IN]
        lines.append([row["name"], str(row["found"]), str(row["replaced"]), left, *ratios])
    settings = result["settings"]
    table = markdown(["model", "found", "replaced", "left, and why", *names], lines, ["found", "replaced", *names])
    what = f"{settings['task']} of other people's U-Nets, {settings['width']} channels in the first level"
    return f"{_conditions(path, result, what)}\n\n{table}"


def _drop_in_ratio(samples: Mapping[str, Sequence[float]], other: str, ours: str) -> str:
    """How many times as long as ours the other takes, or which of the two could not run the model."""
    failed = [name for name in (other, ours) if name not in samples]
    return f"{' and '.join(failed)}: failed" if failed else spread_text(ratio(samples, other, ours), digits=2)


def _conditions(path: Path, result: Result, what: str = "") -> str:
    return (
        f"{conditions(result, what)}; medians of at most {result['settings']['rounds']} rounds in turn, p10 to p90 in "
        f"brackets; above 1, fastunet is faster (`{path}`):"
    )


def losing_cases() -> str:
    """Return a line for each net and provider that fastunet is slower than."""
    lines = []

    def add(net: str, path: Path, task: str, provider: str, median: float, text: str) -> None:
        if median < 1 and not provider.startswith("fastunet"):  # Ours by another name.
            lines.append([f"{net} (`{path.name}`)", task, provider, text])

    for path in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        settings = result.get("settings", {})
        if any(result.get("summary", {}).get(task) for task in TASKS):
            net = f"{'-'.join(map(str, settings['features']))}, {settings['dtype']}, {settings['size']} pixels"
            net += f", batches of {settings['batch']}" if settings["batch"] > 1 else ""
            for task in TASKS:
                for provider, found in (result["summary"].get(task) or {}).items():
                    add(net, path, task, provider, found["ratio"], ratio_text(found))
            for provider, of_frozen in _of_frozen(result).items():
                add(net, path, "inference, frozen", provider, of_frozen.median, spread_text(of_frozen, digits=2))
        if path.name.startswith("drop_in_"):
            for row in result["rows"]:
                for other, ours in DROP_IN:
                    if other in row["samples_ms"] and ours in row["samples_ms"]:
                        found = ratio(row["samples_ms"], other, ours)
                        text = spread_text(found, digits=2)
                        add(row["name"], path, settings["task"], f"{other}, of {ours}", found.median, text)
    times = "its time / time of fastunet"
    return markdown(["net", "task", "faster provider", times], lines, right=[times])


def memory_table() -> str:
    """Return the bytes that are kept and moved for one image, by what computes the net."""
    kept, moved = _load("saved_memory.json")["summary"], _load("traffic.json")
    images = moved["settings"]["batch"]
    rows = {
        "kept for the backward of a training step": (kept["triton"]["bytes"], kept["eager"]["bytes"]),
        "moved in inference": [moved["summary"][name]["bytes"] / images for name in ("joined", "eager")],
    }
    figures = ["Triton kernels", "plain PyTorch"]
    lines = [[name, *(f"{each / 1e6:.0f}" for each in found)] for name, found in rows.items()]
    return markdown(["MB for each image", *figures], lines, right=figures)


BLOCKS: dict[str, Callable[[], str]] = {
    "training": accuracy_table,
    "speed": speed_tables,
    "speed-in-short": lambda: speed_tables(names=README_FILES),
    "slower": losing_cases,
    "memory": memory_table,
}


# --- pictures ---


def write_pictures(folder: Path) -> None:
    """Write the tutorial's pictures from the files that its commands left in `folder`."""
    from PIL import Image

    (DOCS / "pictures").mkdir(exist_ok=True)
    report = Image.open(folder / "RUN" / "report.png").convert("RGB")
    names = ("NEW/images/cell_000.png", "LABELS/cell_000.png", "LABELS/cell_000_overlay.png")
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    side = PICTURE_WIDTH // len(names)
    row = Image.new("RGB", (side * len(names), side - 8), "white")
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
    for page in (ROOT / "README.md", DOCS / "performance.md"):
        page.write_text(with_blocks(page))
    if options.pictures is not None:
        write_pictures(options.pictures)


if __name__ == "__main__":
    main()
