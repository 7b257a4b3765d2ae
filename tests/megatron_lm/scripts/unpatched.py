"""Runs a script of an unpatched checkout on the CPU as it is: ``python -m unpatched CHECKOUT SCRIPT
arguments...``."""

import sys
from pathlib import Path

from megatron_dip.checkouts.launching import run_script
from megatron_dip.without_cuda.scripts import prepare_imports, prepare_scripts

if __name__ == "__main__":
    checkout, script, *arguments = sys.argv[1:]
    sys.path.insert(0, checkout)
    prepare_scripts()
    run_script(Path(script), arguments)
else:
    prepare_imports()  # in a process that Megatron-LM has spawned
