"""The command line: a file per command. Each parses, calls the library, and prints.

What a command runs on is imported when it runs: help and wrong arguments do not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fastunet import __version__

from . import bench, check, demo, doctor, evaluate, export, predict, train, tune

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
commands = {
    "From images to masks": (demo.demo, check.check, train.train, predict.predict, evaluate.evaluate, export.export),
    "This machine": (doctor.doctor, tune.tune, bench.bench),
}
for group, members in commands.items():
    for command in members:
        app.command(rich_help_panel=group)(command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"fastunet {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train a U-Net on a folder of images and masks, and predict masks of other images."""
