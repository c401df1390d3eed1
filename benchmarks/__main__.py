"""`python -m benchmarks COMMAND`: each command is a module of its name, imported when it is asked for.

Its docstring is the help, `add_arguments` declares its options, and `run` takes them and returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fastunet.checks import FastUNetError

# What each does.
COMMANDS = {
    "ops": "every public op beside torch's composition of it",
    "unet": "a whole net against the nets people run; --host: what its calls cost the host",
    "dropin": "other people's U-Nets under torch.compile: fastunet's backend against inductor",
    "tune": "the fastest configurations on this GPU, and where they are faster than ATen",
    "static": "every kernel configuration compiled ahead of time, and looked at; no GPU is needed",
    "roofline": "the least time of each layer at given peak rates, and how near it came",
    "memory": "bytes that a training step keeps, or that the kernels move; no GPU is needed",
    "accuracy": "training against a plain script, or a model against its copy in 8 bits",
    "gpu": "the report of a GPU: parity, peak rates, layers, nets, tests, configurations",
    "compare-commits": "the working tree against a commit: parity first, then speed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. SystemExit with 2 where it cannot be run so."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            module = import_module(f".{name.replace('-', '_')}", __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    options = parser.parse_args(given)
    try:
        return options.run(options)
    except (FastUNetError, OSError) as error:
        return options.parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
