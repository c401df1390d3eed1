"""`python -m benchmarks COMMAND`: each command is a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# By command, its module and what it does.
COMMANDS = {
    "unet": ("unet", "a whole net against the nets people run; --host: what its calls cost the host"),
    "static": ("static", "every kernel configuration compiled ahead of time, and looked at; no GPU is needed"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
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
    return options.run(options, options.parser)


if __name__ == "__main__":
    sys.exit(main())
