"""``python -m megatron_dip``: the ``megatron-dip`` command."""

import sys

from megatron_dip.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
