"""Patch a Megatron-LM checkout so that its own scripts take --pipeline-schedule dip, and take the patch back.

The patch is some twenty lines in three files (see patches/README.md); everything else lives in this package. Without git the files
must be those of a known release; with git, committed changes elsewhere in them are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dip.checkouts.patching import inspect_tree, write_state
from megatron_dip.cli.output import print_json

SUMMARY = "patch a Megatron-LM checkout for --pipeline-schedule dip, or take the patch back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="root of the Megatron-LM source tree")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="change nothing; say whether the tree is patched or can be (else exit status 2)")
    action.add_argument("--revert", action="store_true", help="take the patch back")
    parser.add_argument("--repair", action="store_true",
                        help="instead: mend scripts that do not run as released (or with --revert, --check: the same for these repairs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    tree = inspect_tree(args.checkout, repair=args.repair)
    label = f"Megatron-LM {tree.version} ({tree.release or 'release not known byte for byte'})"
    if args.check:
        state = "patched" if tree.patched else "not patched" if tree.untouched else "patched in part"
        if args.json:
            print_json({"version": tree.version, "release": tree.release, "state": state, "patch": tree.patch})
            return 0
        print(f"{label}: {state}; {tree.patch} {'is in place' if tree.patched else 'applies'}")
        return 0
    written = write_state(tree, patched=not args.revert)
    if args.json:
        print_json({"version": tree.version, "release": tree.release, "state": "not patched" if args.revert else "patched", "patch": tree.patch, "written": written})
        return 0
    done = "patch taken back from" if args.revert else f"{tree.patch} applied to"
    print(f"{label}: {done} {', '.join(written)}" if written else f"{label}: {'not patched' if args.revert else 'already patched'}, nothing to do")
    return 0
