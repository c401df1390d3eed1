"""A whole net against the nets people run. --host: what its calls alone cost the host, on images of 16x16 pixels."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastunet.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--host", action="store_true", required=True, help="time the calls, on next to no arithmetic")
    parser.add_argument("--rounds", type=int, help="samples of each time, at most")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write every sample and the ratios")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Time, print and write; return the exit code."""
    from . import host

    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    found = host.compare(host.Settings(**({} if options.rounds is None else {"rounds": options.rounds})))
    for row in found["rows"]:
        print(host.line(row))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
    return 0
