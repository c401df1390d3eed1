"""What the commands have in common: their arguments, the terminal, and a run that is loaded and fits its images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import rich.progress
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastunet.checks import check_choice
from fastunet.data.layout import DataOptions

if TYPE_CHECKING:
    from fastunet.segmenter import Segmenter

# Names of files are printed as they are, whatever they look like.
console = Console(markup=False, emoji=False, highlight=False)

DATA = typer.Argument(metavar="DATA", help="Folder with images/ and masks/ of the same file names.")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `fastunet train` wrote.")]


def option(group: str, help: str, *names: str, **more: Any) -> Any:
    """Return an option as `--help` shows it, in its group. Brackets in the text are meant as they are."""
    return typer.Option(*names, help=escape(help), rich_help_panel=group.capitalize(), **more)


DeviceOption = Annotated[str, option("hardware", "auto (a GPU where there is one), cpu or cuda.")]
TtaOption = Annotated[bool, option("prediction", "Average eight flips and turns, for eight times the work.")]
OverwriteOption = Annotated[bool, option("output", "Replace what fastunet wrote there before.", "--overwrite")]
TileOption = Annotated[
    int, option("hardware", "Side in pixels of the tiles in which larger images are predicted.", min=1)
]


GROUPS = ("Output", "Data", "Model", "Training", "Validation", "Scores", "Prediction", "Hardware")


def with_fields(settings: Any, command: Callable[..., None], **types: Any) -> Callable[..., None]:
    """Give a command the fields of a dataclass as options, in the place of its last argument, which takes them, and
    sort its options by the groups that help shows.
    """
    types = get_type_hints(settings) | types
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    for each in fields(settings):
        typed: Any = Annotated[types[each.name], option(each.metadata.get("group", "data"), each.metadata["meaning"])]
        place = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(each.name, place, default=each.default, annotation=typed))

    def place_of(parameter: inspect.Parameter) -> int:
        (described, *_) = getattr(parameter.annotation, "__metadata__", [None])
        group = getattr(described, "rich_help_panel", None)
        return GROUPS.index(group) if group else -1  # arguments, and typer's context

    options = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in sorted(parameters, key=place_of)]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return command


with_reading = partial(with_fields, DataOptions)  # which a command takes out of its last argument by `pop_reading`


def pop_reading(context: typer.Context, options: dict[str, Any], before: DataOptions | None = None) -> DataOptions:
    """Take the options of how data are read out of all: those that were typed, else those of a run `before`."""
    given = {field.name: options.pop(field.name) for field in fields(DataOptions)}
    typed = {name: given[name] for name in given if is_typed(context, name)}
    return replace(before or DataOptions(), **typed)


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line, or in the file of `--config`."""
    return getattr(context.get_parameter_source(name), "name", "") in ("COMMANDLINE", "DEFAULT_MAP")


def parse_features(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"features: expected whole numbers with commas between, got {text!r}") from None


def chosen_device(name: str) -> str:
    check_choice("device", name, ("auto", "cpu", "cuda"))
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise typer.BadParameter("device: expected a CUDA device for 'cuda', got none")
    return "cuda" if has_cuda and name != "cpu" else "cpu"


def load(run: Path, device: str, tile: int) -> Segmenter:
    """Load a run onto the device. Says so where tiles would not give what the whole image gives.

    Raises DataError on missing or broken files, ConfigError on tiles too small for the net.
    """
    from fastunet.segmenter import load as load_run

    segmenter = load_run(run, chosen_device(device))
    if not segmenter.check_tile(tile):
        text = f"instance norm depends on the whole image: images above {tile} pixels go through in blended tiles"
        console.print(text, soft_wrap=True)
    return segmenter


@contextmanager
def bar(text: str, *, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar; yield what is told how much is done, of how much, and from then on another text."""
    percentage = TextColumn("{task.percentage:.0f} %")
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), percentage, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=transient) as bars:
        task = bars.add_task(text, total=1.0)
        yield lambda done, total=1.0, text=None: bars.update(
            task, completed=done, total=total, description=text or None
        )


def track(items: Any, text: str) -> Any:
    # len() first: a dataset is a sequence that ends by IndexError.
    return rich.progress.track(items, text, total=len(items), console=console, transient=True)


def print_scores(metrics: Any, title: str, more: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Print the scores over all pixels, and columns of `more` on each class, by their titles."""
    if "dice" not in metrics:
        return
    console.print(title, soft_wrap=True)
    table = Table("class", "Dice", "IoU", *(more or {}))
    background, *foreground = metrics["dice"]
    if len(foreground) > 1:
        table.add_row("mean of the foreground", f"{metrics['mean_dice']:.4f}", f"{metrics['mean_iou']:.4f}")
    for name in (*foreground, background):
        others = (column[name] for column in (more or {}).values())
        table.add_row(name, f"{metrics['dice'][name]:.4f}", f"{metrics['iou'][name]:.4f}", *others)
    console.print(table)
