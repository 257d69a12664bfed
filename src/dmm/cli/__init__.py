"""The command line: one file a command, arguments only; the work is done by the modules they call.

A command is a module of this package with a docstring, which is its help, ``add_arguments(parser)``
and ``run(args)``. It imports what is heavy inside ``run``, after it has checked its arguments.
"""

import importlib
import sys
from collections.abc import Sequence

import dmm
from dmm.cli.arguments import Parser
from dmm.cli.ending import TERMINATED, terminable, told_of_system
from dmm.errors import UserError, nearest, one_line

COMMANDS = {
    "accelerate": "make a model one that paints in four steps",
    "add": "merge further styles into a merged model, and keep those that it has",
    "compare": "put several evaluations side by side",
    "demo": "merge the embedded experts and see what comes of it, on any computer",
    "evaluate": "measure how faithful a merged model is to its teachers",
    "generate": "make pictures with a model",
    "export": "write a style of a merged model as a stock checkpoint",
    "soup": "merge models without training, and take them out again",
    "plan": "tell what a merge will take of memory, disk and time",
    "merge": "distil many models into one with all their styles",
    "remove": "take a style out of a merged model",
    "serve": "open a page in which to paint with a merged model, or to watch a merge",
}

USAGE = f"""\
usage: dmm COMMAND ...

{dmm.__doc__}

commands:
{"".join(f"  {name:<12}{summary}" + chr(10) for name, summary in COMMANDS.items())}
options:
  -h, --help     show this
  --version      show the version

  dmm COMMAND --help tells what a command does, with examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, by default the process's own.
    Returns: the exit status: 0; 2 for what the user can mend, told in one line on stderr; 130 if interrupted, 143 if
        terminated.
    """
    with terminable() as terminated:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        except UserError as error:
            print(f"dmm: error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            told = told_of_system(error)
            if told is None:
                raise
            print(f"dmm: error: {one_line(told)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            # a command that knows what is left behind says so in the exception
            how = "dmm: terminated" if terminated else "dmm: interrupted"
            print(": ".join([how, *map(str, interrupt.args)]), file=sys.stderr)
            return TERMINATED if terminated else 130
    return 0


def _run(argv: list[str]) -> None:
    if not argv:
        raise UserError(f"Name a command: {', '.join(COMMANDS)} (dmm --help tells more).")
    command, *rest = argv
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"dmm {dmm.__version__}")
    elif command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        raise UserError(f"There is no {kind} '{command}'{nearest(command, [*COMMANDS, '--help', '--version'])}.")
    else:
        module = importlib.import_module(f"dmm.cli.{command}")
        parser = Parser(command, module.__doc__)
        module.add_arguments(parser)
        module.run(parser.parse(rest))
