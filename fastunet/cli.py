"""The command line: demo, train, predict, evaluate, bench, doctor. Each parses, calls the library, and prints."""

from __future__ import annotations

import math
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import __version__, dispatch
from .checks import DataError, FastUNetError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A U-Net from a folder of images and masks, and what it predicts.",
)
console = Console()

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="Folder with images/ and masks/ of equal stems.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `fastunet train` has left.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TtaOption = Annotated[bool | None, typer.Option("--tta/--no-tta", help="Average eight flips and turns [as trained].")]
TileOption = Annotated[int, typer.Option(min=1, help="Images larger than this go through in overlapping tiles.")]


def run() -> None:
    """Run the app: what the user can mend ends as one line and exit code 2."""
    from .training import Interrupted

    try:
        app()
    except Interrupted as stop:
        _fail(str(stop), INTERRUPTED)
    except FastUNetError as error:
        _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _fail(message: str, code: int) -> None:
    # Plain print: rich would wrap the line and colour the numbers in file names.
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# --- train ---


@app.command()
def train(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="Folder for the run: weights, settings, metrics, report.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    max_minutes: Annotated[float | None, typer.Option(help="Limit in minutes; the schedule ends by it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    batch_size: Annotated[int, typer.Option(help="Crops per step.")] = 4,
    crop: Annotated[int, typer.Option(help="Edge of the crops in pixels.")] = 256,
    features: Annotated[str, typer.Option(help="Channels of each level.")] = "16,32,64,128,256",
    norm: Annotated[str, typer.Option(help="batch, instance or none.")] = "batch",
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 5e-2,
    val_fraction: Annotated[float, typer.Option(help="Share of the images kept out for the metrics.")] = 0.15,
    split: Annotated[str, typer.Option(help="Which: the last by name, or random.")] = "last",
    classes: Annotated[int | None, typer.Option(help="Number of classes [inferred from the masks].")] = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Average eight flips and turns when predicting.")] = True,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: DeviceOption = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes that read images [4 beside a GPU, else 0].")] = None,
    seed: Annotated[int, typer.Option(help="Of split, weights, crops and augmentation.")] = 0,
) -> None:
    """Train a U-Net on DATA; leave model, settings, metrics, history and report.png in OUT."""
    from .train_config import TrainConfig

    config = TrainConfig(
        steps=steps,
        max_minutes=max_minutes,
        batch_size=batch_size,
        crop=crop,
        features=_parse_features(features),
        norm=norm,
        lr=lr,
        weight_decay=weight_decay,
        val_fraction=val_fraction,
        split=split,
        classes=classes,
        tta=tta,
        precision=precision,
        device=device,
        workers=workers,
        seed=seed,
    )
    _train_with_bar(data, out, config, resume=resume)


def _parse_features(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers with commas between, got {text!r}") from None


def _train_with_bar(data: Path, out: Path, config: Any, *, resume: bool = False) -> dict[str, Any]:
    from .training import Progress as Standing
    from .training import train as train_run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=1.0)

        def show(standing: Standing) -> None:
            last = standing.history[-1] if standing.history else {}
            dice = f"  val Dice {last['val_dice']:.3f}" if "val_dice" in last else ""
            text = f"step {standing.step}  loss {standing.loss:.3f}{dice}"
            bars.update(bar, completed=standing.fraction, description=text)

        metrics = train_run(data, out, config, resume=resume, on_step=show)
    _print_scores(metrics, f"{len(metrics['images'])} images kept out of training")
    console.print(f"report: {out / 'report.png'}", soft_wrap=True)
    return metrics


def _print_scores(metrics: Any, title: str) -> None:
    if "dice" not in metrics:
        return
    table = Table("class", "Dice", "IoU", title=title, title_justify="left")
    for name, dice in metrics["dice"].items():
        table.add_row(name, f"{dice:.4f}", f"{metrics['iou'][name]:.4f}")
    table.add_row("mean", f"{metrics['mean_dice']:.4f}", f"{metrics['mean_iou']:.4f}")
    console.print(table)


# --- predict, evaluate ---


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the label images.")],
    tta: TtaOption = None,
    tile: TileOption = 2048,
    device: DeviceOption = "auto",
) -> None:
    """Write OUT/<stem>.png for each image: labels, or 0 and 255 where there is one class."""
    from PIL import Image

    from .data import find_images, mask_from_labels, normalize, read_image
    from .files import written_whole
    from .inference import labels_of
    from .inference import predict as probabilities_of

    model, config = _load(run, device)
    files = find_images(images)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: expected a folder for the predictions, got a file")
    out.mkdir(parents=True, exist_ok=True)
    use_tta = config.training["tta"] if tta is None else tta
    target = next(model.parameters()).device
    for file in _track(files, "predicting"):
        pixels = read_image(file)
        _check_like_training(file, pixels, config.data, 2**model.depth)
        image = normalize(pixels).to(target)
        labels = labels_of(probabilities_of(model, image, tile=tile, tta=use_tta)).cpu().numpy()
        with written_whole(out / f"{file.stem}.png") as temporary:
            Image.fromarray(mask_from_labels(labels, config.data.classes)).save(temporary)
    console.print(f"{len(files)} predictions in {out}", soft_wrap=True)


@app.command()
def evaluate(
    run: RunArgument,
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    tta: TtaOption = None,
    tile: TileOption = 2048,
    device: DeviceOption = "auto",
) -> None:
    """Score RUN on every pair of DATA: Dice and IoU per class, over all pixels."""
    from .data import SegmentationDataset, find_pairs, inspect, read_image
    from .files import write_json
    from .inference import evaluate as scores_of

    model, config = _load(run, device)
    pairs = find_pairs(data)
    classes = config.data.classes
    summary = inspect(pairs, classes)
    for pair in pairs:
        _check_like_training(pair.image, read_image(pair.image), config.data, 2**model.depth)
    dataset = SegmentationDataset(pairs, summary)
    use_tta = config.training["tta"] if tta is None else tta
    scores, _ = scores_of(model, _track(dataset, "evaluating"), config.class_names, tile=tile, tta=use_tta)
    _print_scores(scores, f"{len(pairs)} images of {data}")
    seen = sorted(set(config.train) & {pair.stem for pair in pairs})
    if seen:
        console.print(f"note: {len(seen)} of them have the names of training images", soft_wrap=True)
    if out is not None:
        write_json(out, {**scores, "images": [pair.stem for pair in pairs], "tta": use_tta})


def _load(run: Path, device: str) -> tuple[Any, Any]:
    from .checkpoint import load_run

    target = _device(device)
    model, config = load_run(run)
    return model.to(target), config


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"device: expected auto, cpu or cuda, got {name!r}")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise typer.BadParameter("device: expected a CUDA device for 'cuda', got none")
    return "cuda" if has_cuda and name != "cpu" else "cpu"


def _check_like_training(file: Path, pixels: Any, trained: Any, least: int) -> None:
    """An image is of the kind the model was trained on, and large enough for it."""
    height, width, channels = pixels.shape
    if channels != trained.channels:
        raise DataError(f"{file}: expected {trained.channels} channels, as in training, got {channels}")
    if pixels.dtype.name != trained.dtype:
        raise DataError(f"{file}: expected {trained.dtype}, as in training, got {pixels.dtype.name}")
    if min(height, width) < least:
        raise DataError(f"{file}: expected at least {least}x{least} pixels, got {height}x{width}")


def _track(items: Any, text: str) -> Any:
    from rich.progress import track

    # len() first: a dataset is a sequence that ends by IndexError.
    return track(items, text, total=len(items), console=console, transient=True)


# --- bench ---

DTYPES = ("auto", "float32", "bfloat16", "float16")


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("fastunet-bench"),
    device: DeviceOption = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute: smaller, without torch.compile.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what takes minutes or more to compile.")] = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")] = "auto",
    size: Annotated[int | None, typer.Option(help="Side of the images [256; 512 on a GPU; 128 --quick].")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at once [1; 16 on a GPU].")] = None,
    features: Annotated[str | None, typer.Option(help="Channels of each level [from 32; 64 on a GPU].")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Take so many samples of each, however long.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="The net's layers too, or the net alone.")
    ] = True,
) -> None:
    """Compare the net and its layers with PyTorch's: eager, folded, compiled. Each is checked before it is timed."""
    from .benchmarks.comparison import check_settings, compare, default_settings, report
    from .benchmarks.comparison_report import draw, tables
    from .files import write_json

    if quick and everything:
        raise typer.BadParameter("expected --quick or --all, got both")
    target = _device(device)
    given: dict[str, Any] = {"size": size, "batch": batch}
    given["features"] = None if features is None else _parse_features(features)
    given = {name: value for name, value in given.items() if value is not None}
    # A CPU's allocator takes a while to settle.
    given |= {} if rounds is None else {"rounds": rounds, "seconds": math.inf, "warmup": max(8, rounds // 3)}
    given |= {} if layers else {"layers": ()}
    settings = default_settings(target, _bench_dtype(dtype, target), quick=quick, thorough=everything, **given)
    check_settings(settings)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: expected a folder for the results, got a file")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with console.status("starting") as status:
        for row in compare(settings, lambda doing: status.update(f"comparing {doing}")):
            rows.append(row)
            write_json(out / "bench.json", report(settings, rows))
    result = report(settings, rows)
    draw(result, out / "bench.png")
    for table in tables(result):
        console.print(table)
    console.print(f"every sample: {out / 'bench.json'}   picture: {out / 'bench.png'}", soft_wrap=True)
    if wrong := [row["name"] for row in rows if row["status"] != "ok"]:
        _fail(f"fastunet itself failed in {', '.join(wrong)}: see 'not measured' above", FAILED)


def _bench_dtype(name: str, device: str) -> torch.dtype:
    from .train_config import multiplies_bf16

    if name not in DTYPES:
        raise typer.BadParameter(f"dtype: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {name!r}")
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(cpu=device == "cpu") else torch.float32
    return getattr(torch, name)


# --- doctor ---


@app.command()
def doctor() -> None:
    """Print versions and devices, and which implementation each op gets on each device, and why."""
    from .doctor import device_table, op_table, package_table

    console.print(f"fastunet {__version__}, Python {platform.python_version()}, {platform.platform()}", soft_wrap=True)
    console.print(package_table())
    console.print(device_table())
    backend = dispatch.selected_backend()
    console.print(f"backend: {backend} (FASTUNET_BACKEND or fastunet.backend changes it)", soft_wrap=True)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        console.print(op_table(device))


# --- demo ---


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data and run; made anew.")] = Path("fastunet-demo"),
    minutes: Annotated[float, typer.Option(help="Time for training.")] = 1.5,
) -> None:
    """Make cell-like micrographs with exact masks, train a small net on them, and draw the report."""
    import shutil

    from .synthetic import write_dataset
    from .train_config import TrainConfig

    data, run_folder, predictions = out / "data", out / "run", out / "predictions"
    for folder in (data, run_folder, predictions):
        shutil.rmtree(folder, ignore_errors=True)
    console.print("1. making 40 micrographs with masks")
    write_dataset(data, 40)
    console.print(f"2. training for at most {minutes:g} minutes")
    config = TrainConfig(steps=600, max_minutes=minutes, crop=128, features=(16, 32, 64, 128))
    _train_with_bar(data, run_folder, config)
    console.print("3. predicting")
    predict(run_folder, data / "images", predictions)
    console.print(f"open {run_folder / 'report.png'}", soft_wrap=True)
    console.print(f"next: fastunet train YOUR_DATA --out RUN   (as {data}: images/ and masks/)", soft_wrap=True)
