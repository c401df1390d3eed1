"""`python -m benchmarks COMMAND`: each command is a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fastunet.checks import FastUNetError

# By command, its module and what it does.
COMMANDS = {
    "ops": ("ops", "every public op beside torch's composition of it"),
    "unet": ("unet", "a whole net against the nets people run; --host: what its calls cost the host"),
    "dropin": ("dropin", "other people's U-Nets under torch.compile: fastunet's backend against inductor"),
    "tune": ("tune", "the fastest configurations on this GPU, and where they are faster than ATen"),
    "static": ("static", "every kernel configuration compiled ahead of time, and looked at; no GPU is needed"),
    "roofline": ("roofline", "the least time of each layer at given peak rates, and how near it came"),
    "memory": ("memory", "bytes that a training step keeps, or that the kernels move; no GPU is needed"),
    "accuracy": ("accuracy", "training against a plain script, or a model against its copy in 8 bits"),
    "gpu": ("gpu", "the report of a GPU: parity, peak rates, layers, nets, tests, configurations"),
    "compare-commits": ("compare_commits", "the working tree against a commit: parity first, then speed"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. SystemExit with 2 where it cannot be run so."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            module = import_module(f".{module_name}", __package__)
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
