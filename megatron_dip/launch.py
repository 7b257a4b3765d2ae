"""Start a Megatron-LM script with --pipeline-schedule at hand, its checkout unpatched.

    torchrun --nproc-per-node 4 -m megatron_dip.launch pretrain_vlm.py --pipeline-schedule dip ...
    python -m megatron_dip.launch --device cpu pretrain_gpt.py ...

The script's own arguments follow its name. ``--device cpu`` runs it over gloo without CUDA, for tests and for trying things out; it is
refused on a machine with CUDA devices. A patched checkout (``megatron-dip patch``) runs its scripts without this launcher.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dip.runtime.startup import load_kernels_eagerly
from megatron_dip.spec.errors import EXIT_CODE, InputError

_DEVICE_VARIABLE = "MEGATRON_DIP_LAUNCH_DEVICE"
_CHECKOUT_VARIABLE = "MEGATRON_DIP_LAUNCH_CHECKOUT"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dip.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: run without CUDA, over gloo")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a training script of a Megatron-LM checkout")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    return parser.parse_args(argv)


def prepare(checkout: Path, script_folder: Path, device: str) -> None:
    """Makes the checkout importable with the patch in memory, on the device."""
    from megatron_dip.checkouts.launching import patch_in_memory

    for folder in (str(checkout), str(script_folder)):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    patch_in_memory(checkout)
    if device == "cpu":
        from megatron_dip.without_cuda.scripts import prepare_scripts

        prepare_scripts()


def main() -> int:
    args = parse_arguments()
    try:
        from megatron_dip.checkouts.launching import find_checkout, run_script

        if not args.script.is_file():
            raise InputError("SCRIPT", str(args.script), "no such file", "give the path of a script, such as pretrain_vlm.py")
        checkout = find_checkout(args.script)
        # Processes that Megatron spawns, to write checkpoints for instance, prepare themselves by these.
        os.environ[_DEVICE_VARIABLE], os.environ[_CHECKOUT_VARIABLE] = args.device, str(checkout)
        if args.device == "cuda":
            load_kernels_eagerly()
        prepare(checkout, args.script.resolve().parent, args.device)
    except InputError as error:
        print(f"megatron_dip.launch: error: {error}", file=sys.stderr)
        return EXIT_CODE
    try:
        run_script(args.script, args.arguments)
    except ImportError as error:
        if "from 'typing'" not in str(error):
            raise
        version = ".".join(map(str, sys.version_info[:3]))
        print(
            f"megatron_dip.launch: error: Python = {version}: this Megatron-LM needs a newer one ({error}). Remedy: use Python 3.12.", file=sys.stderr
        )
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__mp_main__" and os.environ.get(_DEVICE_VARIABLE) == "cpu":
    from megatron_dip.without_cuda.scripts import prepare_imports

    prepare_imports()
    sys.path.insert(0, os.environ[_CHECKOUT_VARIABLE])
