"""The command `dynllava`: evaluation, tables, benchmarks, comparison of policies, pictures, versions.

What builds its parsers imports neither torch nor transformers nor pandas: help and a misspelt name are answered at once,
the rest is imported by the function that runs.
"""

from __future__ import annotations

import dynllava_plugin.interrupts  # noqa: F401  before all that takes time

# isort: split
import argparse
import re
import sys
from importlib import import_module
from typing import Any, NoReturn

from dynllava_plugin import checkpoint_command
from dynllava_plugin.errors import UserError, nearest
from dynllava_plugin.evaluation.own_sets import build_lvis as build_command
from dynllava_plugin.evaluation.results import command as table_command
from dynllava_plugin.evaluation.suite import command as suite_command

# Modules with `add_arguments(parser)` and `run(args)`, imported where they are asked for.
COMMANDS = {
    "answer": (
        "dynllava_plugin.evaluation.answer_command",
        "answers to your own questions, both files as LLaVA's",
    ),
    "bench": ("dynllava_plugin.bench.command", "time and memory of each mode, with random weights"),
    "compare": (
        "dynllava_plugin.compare.command",
        "policies on one checkpoint: accuracy, equivalent tokens, time",
    ),
    "serve": (
        "dynllava_plugin.serve.command",
        "an OpenAI-compatible server over one checkpoint, a policy per request",
    ),
    "show": (
        "dynllava_plugin.visualize.command",
        "a picture of what a policy keeps of an image and its answer",
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser, and the parsers of its subcommands, that name what was probably meant by a misspelt flag or choice."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does; a flag that is left over is an error of the parser that read it."""
        found, left = super().parse_known_args(args, namespace)
        flag = next((item.partition("=")[0] for item in left if item.startswith("-")), None)
        if flag is not None:
            known = dict.fromkeys(re.findall(r"--[a-z][\w-]*", self.format_help()))
            self.error(f"{flag}: no such option; {nearest(flag, known, f'{self.prog} --help lists them')}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and `message`; behind argparse's own line on a wrong choice, the nearest ones."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        meant = nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2]), "") if wrong else ""
        super().error(f"{message}; {meant}" if meant else message)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 with one line for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(prog="dynllava", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if arguments[:1] == [name]:
            loaded = import_module(module_name)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    for module in (suite_command, table_command, build_command, checkpoint_command):
        module.add_parser(commands)
    version = commands.add_parser("version", help="installed versions of what decides the numbers")
    version.set_defaults(run=_version)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dynllava table ... | head`
        sys.stderr.close()
        return 0


def _version(args: argparse.Namespace) -> int:
    from dynllava_plugin.environment import versions

    for name, number in versions().items():
        print(f"{name} {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
