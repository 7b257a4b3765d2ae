"""Print a script that completes commands and flags in a shell: eval "$(megatron-dip completion bash)". Needs shtab (the extra "completion")."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

SUMMARY = "print a shell's completion script"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script to print")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.cli.main import build_parser
    from megatron_dip.spec.errors import InputError

    if find_spec("shtab") is None:
        raise InputError("completion", args.shell, "needs shtab, which is not installed", 'pip install "megatron-dip[completion]"')
    import shtab

    print(shtab.complete(build_parser(None), shell=args.shell))
    return 0
