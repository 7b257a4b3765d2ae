"""The ``megatron-dip`` command: finds the sub-command's module, runs it, turns a user's mistake into one line and exit code 2.

Each sub-command is a module of this package with ``SUMMARY`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``. Only the
module that is asked for is imported, so that ``megatron-dip plan`` neither loads torch nor waits for it. A command that is over in moments
also goes without what only long-lived processes need (:func:`_brief`): of a small plan's second that is a quarter.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import errno
import gc
import importlib
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_dip.spec.errors import EXIT_CODE, InputError
from megatron_dip.version import __version__

_DESCRIPTION = "Plan, simulate and run DIP, the dynamic interleaved pipeline for multimodal models on Megatron-LM."

COMMANDS = (
    "estimate",
    "lengths",
    "plan",
    "workload",
    "check",
    "simulate",
    "profile",
    "calibrate",
    "train",
    "tune",
    "patch",
    "checkpoint",
    "trace",
    "report",
    "playground",
    "schema",
    "completion",
)
"""Sub-commands in the order of the help; each is ``megatron_dip.cli.<name>_command``."""
_INTERRUPTED, _PIPE_CLOSED = 130, 141
"""Exit statuses as a shell gives them for the signals."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG})
_NO_PATHS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})
BRIEF_COMMANDS = frozenset({"estimate", "plan", "workload", "check", "simulate"})
_NUMBAS_BLAS = "scipy.linalg.cython_blas"
"""Imported by numba with its first kernel, where scipy is installed at all, for kernels that call BLAS; ours do not."""


def _module_name(command: str) -> str:
    return f"megatron_dip.cli.{command}_command"


def build_parser(command: str | None, *, only_summaries: bool = False) -> argparse.ArgumentParser:
    """The parser for one sub-command, or for all when ``command`` is None.

    Args:
        only_summaries: leave out the commands' own arguments, and import none of them: enough for the overview.
    """
    parser = argparse.ArgumentParser(prog="megatron-dip", allow_abbrev=False, description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"megatron-dip {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        if only_summaries:
            subparsers.add_parser(name, help=_summary(name), allow_abbrev=False)
        elif command in (None, name) and find_spec(_module_name(name)) is not None:
            module = importlib.import_module(_module_name(name))
            subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.__doc__, allow_abbrev=False,
                                              formatter_class=argparse.RawDescriptionHelpFormatter)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _summary(command: str) -> str:
    """``SUMMARY`` of a command's module, read and not run."""
    spec = find_spec(_module_name(command))
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return next(
        str(ast.literal_eval(node.value)) for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SUMMARY"
    )


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """As ``parse_args``; a flag that the command does not know is said with that command's usage, a command by its likeness to ours."""
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None and word not in COMMANDS:
        like = difflib.get_close_matches(word, COMMANDS, n=1)
        parser.error(f"{word!r} is no command" + (f": did you mean {like[0]!r}?" if like else f"; commands are {', '.join(COMMANDS)}"))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        known[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


@contextlib.contextmanager
def _brief() -> Iterator[None]:
    """For a process that runs one short command: what it has imported is never searched for garbage, neither now nor at its exit."""
    sys.modules.setdefault(_NUMBAS_BLAS, None)  # type: ignore[arg-type]  # None: not to be imported
    gc.freeze()
    try:
        yield
    finally:
        gc.freeze()


_COMPILER = ("numba", "llvmlite")


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    """Ctrl-C. Within the compiler of kernels an exception can get lost, come out as another one, or leave what crashes at the process' end;
    nothing is being written there, so the process ends at once."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _COMPILER:
            _say("interrupted")
            os._exit(_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; without ``argv`` that of the command line, as the whole purpose of its process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    if arguments == ["--version"]:  # without importing every command
        print(f"megatron-dip {__version__}")
        return 0
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    is_brief = argv is None and command in BRIEF_COMMANDS
    if is_brief:
        gc.disable()
    try:
        parser = build_parser(command, only_summaries=command not in COMMANDS)
        args = _parse(parser, arguments)
        gc.enable()
        with _brief() if is_brief else contextlib.nullcontext():
            status = args.run(args)
            sys.stdout.flush()
            return status
    except InputError as error:
        _say(f"error: {error}")
        return EXIT_CODE
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # whoever reads our output has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno in _NO_PATHS:
            _say(f"error: {str(error.filename)[:80]} cannot be a path here: {error.strerror}. Remedy: name another file.")
            return EXIT_CODE
        if error.errno not in _NO_ROOM:
            raise
        _say(f"error: cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}. Remedy: make room, or write elsewhere.")
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CODE


def _say(text: str) -> None:
    """One line on standard error, whatever characters it holds."""
    print(f"megatron-dip: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
