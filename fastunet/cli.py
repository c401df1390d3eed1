"""The command line: demo, train, predict, evaluate, bench, doctor. Each parses, calls the library, and prints."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import __version__, dispatch
from .checks import ConfigError, DataError
from .cli_errors import FAILED, fail, run_to_the_end
from .inference import TILE
from .outputs import check_apart, check_folder, check_replaceable, is_our_json, is_our_png, save_png

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help are meant as they are
    help="A U-Net from a folder of images and masks, and what it predicts.",
)
# Names of files are printed as they are, whatever they look like.
console = Console(markup=False, emoji=False, highlight=False)

SCORES = ("dice", "iou", "images", "tta")  # what the file of `evaluate` holds, among other things
DATA = typer.Argument(metavar="DATA", help="Folder with images/ and masks/ of equal stems.")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `fastunet train` has left.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TtaOption = Annotated[bool | None, typer.Option("--tta/--no-tta", help="Average eight flips and turns [as trained].")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what fastunet wrote there before.")]
TileOption = Annotated[int, typer.Option(min=1, help="Images larger than this go through in overlapping tiles.")]


def run() -> None:
    """Run the app: what the user can mend, or the system refuses, ends as one line and exit code 2."""
    run_to_the_end(app)


# --- train ---


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the run: weights, settings, metrics, report.")],
    data: Annotated[Path | None, DATA] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    max_minutes: Annotated[float | None, typer.Option(help="Limit in minutes; the schedule ends by it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, as it was begun.")] = False,
    overwrite: OverwriteOption = False,
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
    from .train_checks import resumed_config
    from .train_config import TrainConfig

    given = {name: value for name, value in context.params.items() if name in TrainConfig.__dataclass_fields__}
    given["features"] = _parse_features(features)
    if resume:
        # What is not said is as the run was begun.
        typed = {name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        config = resumed_config(out, {name: given[name] for name in typed})
    else:
        config = TrainConfig(**given)
    _train_with_bar(data, out, config, resume=resume, overwrite=overwrite)


def _parse_features(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"features: expected whole numbers with commas between, got {text!r}") from None


def _train_with_bar(
    data: Path | None, out: Path, config: Any, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    from .training import Progress as Standing
    from .training import train as train_run

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=1.0)

        def show(standing: Standing) -> None:
            last = standing.history[-1] if standing.history else {}
            dice = f"  validation Dice {last['val_dice']:.3f}" if "val_dice" in last else ""
            text = f"step {standing.step}  loss {standing.loss:.3f}{dice}"
            bars.update(bar, completed=standing.fraction, description=text)

        metrics = train_run(data, out, config, resume=resume, overwrite=overwrite, on_step=show)
    _print_scores(metrics, f"{len(metrics['images'])} images kept out of training")
    console.print(f"weights: {metrics['weights']}", soft_wrap=True)
    console.print(f"report: {out / 'report.png'}", soft_wrap=True)
    return metrics


def _print_scores(metrics: Any, title: str) -> None:
    if "dice" not in metrics:
        return
    console.print(title, soft_wrap=True)
    table = Table("class", "Dice", "IoU")
    background, *foreground = metrics["dice"]
    if len(foreground) > 1:
        table.add_row("mean of the foreground", f"{metrics['mean_dice']:.4f}", f"{metrics['mean_iou']:.4f}")
    for name in (*foreground, background):
        table.add_row(name, f"{metrics['dice'][name]:.4f}", f"{metrics['iou'][name]:.4f}")
    console.print(table)


# --- predict, evaluate ---


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the label images.")],
    tta: TtaOption = None,
    tile: TileOption = TILE,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Write OUT/<stem>.png for each image: labels, or 0 and 255 where there is one class."""
    from .data import find_images, mask_from_labels, normalize, read_image
    from .inference import labels_of
    from .inference import predict as probabilities_of

    files = find_images(images)
    check_folder(out)
    check_apart(out, files)
    targets = [out / f"{file.stem}.png" for file in files]
    for target in targets:
        check_replaceable(target, overwrite, is_our_png)
    model, config = _load(run, device)
    _check_tile(tile, config)
    for file in _track(files, "checking"):
        _check_like_training(file, read_image(file), config)
    out.mkdir(parents=True, exist_ok=True)
    use_tta = config.training["tta"] if tta is None else tta
    on = next(model.parameters()).device
    written: set[tuple[int, int]] = set()
    for file, target in _track(list(zip(files, targets, strict=True)), "predicting"):
        image = normalize(read_image(file)).to(on)
        labels = labels_of(probabilities_of(model, image, tile=tile, tta=use_tta)).cpu().numpy()
        if target.exists() and (target.stat().st_dev, target.stat().st_ino) in written:
            raise DataError(f"{file}: expected stems that differ here in more than their case, got {target} once more")
        save_png(target, mask_from_labels(labels, config.data.classes))
        written.add((target.stat().st_dev, target.stat().st_ino))
    console.print(f"{len(files)} predictions in {out}", soft_wrap=True)


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[Path, DATA],
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    tta: TtaOption = None,
    tile: TileOption = TILE,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Score RUN on every pair of DATA: Dice and IoU per class, over all pixels."""
    from .data import SegmentationDataset, find_pairs, inspect, read_image
    from .files import write_json
    from .inference import evaluate as scores_of

    pairs = find_pairs(data)
    if out is not None:
        check_folder(out.parent)
        check_apart(out.parent, [file for pair in pairs for file in (pair.image, pair.mask)])
        check_replaceable(out, overwrite, lambda path: is_our_json(path, SCORES))
    model, config = _load(run, device)
    _check_tile(tile, config)
    summary = inspect(pairs, config.data.classes)
    for pair in pairs:
        _check_like_training(pair.image, read_image(pair.image), config)
    dataset = SegmentationDataset(pairs, summary)
    use_tta = config.training["tta"] if tta is None else tta
    scores, _ = scores_of(model, _track(dataset, "evaluating"), config.class_names, tile=tile, tta=use_tta)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**scores, "images": [pair.stem for pair in pairs], "tta": use_tta})
    _print_scores(scores, f"{len(pairs)} images of {data}")
    seen = sorted(set(config.train) & {pair.stem for pair in pairs})
    if seen:
        console.print(f"note: {len(seen)} of them have the names of training images", soft_wrap=True)


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


def _check_like_training(file: Path, pixels: Any, config: Any) -> None:
    """Raise DataError unless an image is of the kind the model was trained on, and large enough for it."""
    from .train_config import too_small

    height, width, channels = pixels.shape
    if channels != config.data.channels:
        raise DataError(f"{file}: expected {config.data.channels} channels, as in training, got {channels}")
    if pixels.dtype.name != config.data.dtype:
        raise DataError(f"{file}: expected {config.data.dtype}, as in training, got {pixels.dtype.name}")
    if reason := too_small(height, width, len(config.model["features"]), config.model["norm"]):
        raise DataError(f"{file}: {reason}")


def _check_tile(tile: int, config: Any) -> None:
    from .train_config import too_small

    if reason := too_small(tile, tile, len(config.model["features"]), config.model["norm"]):
        raise ConfigError(f"tile: {reason}")


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
    overwrite: OverwriteOption = False,
) -> None:
    """Compare the net and its layers with PyTorch's: eager, folded, compiled. Each is checked before it is timed."""
    from .benchmarks.charts import draw
    from .benchmarks.unet import check_settings, compare, default_settings, report, tables
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
    check_folder(out)
    check_replaceable(out / "bench.json", overwrite, lambda path: is_our_json(path, ("settings", "rows")))
    check_replaceable(out / "bench.png", overwrite, is_our_png)
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
        fail(f"fastunet itself failed in {', '.join(wrong)}: see 'not measured' above", FAILED)


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
    out: Annotated[Path, typer.Option(help="Folder for data, run and predictions.")] = Path("fastunet-demo"),
    minutes: Annotated[float, typer.Option(help="Time for training.")] = 1.5,
    overwrite: OverwriteOption = False,
) -> None:
    """Make cell-like micrographs with exact masks, train a small net on them, and draw the report."""
    from .synthetic import write_dataset
    from .train_checks import check_out, clear_run
    from .train_config import TrainConfig

    config = TrainConfig(steps=600, max_minutes=minutes, crop=128, features=(16, 32, 64, 128))
    config.check()
    data, run_folder, predictions = out / "data", out / "run", out / "predictions"
    check_folder(out)
    check_out(run_folder, resume=False, overwrite=overwrite)
    found = [path for folder in (data, predictions) for path in folder.rglob("*") if not path.name.startswith(".")]
    pictures = [path for path in found if path.is_symlink() or not path.is_dir()]
    for path in pictures:
        check_replaceable(path, overwrite, is_our_png)
    clear_run(run_folder)
    for path in pictures:
        path.unlink()
    console.print("1. making 40 micrographs with masks")
    write_dataset(data, 40)
    console.print(f"2. training for at most {minutes:g} minutes")
    _train_with_bar(data, run_folder, config)
    console.print("3. predicting")
    predict(run_folder, data / "images", predictions)
    console.print(f"open {run_folder / 'report.png'}", soft_wrap=True)
    console.print(f"next: fastunet train YOUR_DATA --out RUN   (as {data}: images/ and masks/)", soft_wrap=True)
