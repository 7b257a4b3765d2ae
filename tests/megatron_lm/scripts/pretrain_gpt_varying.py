"""pretrain_gpt.py of the checkout on mock data whose microbatches are 8 to 32 tokens long, each padded to no more than its own length.

The script runs as it is, up to its main block and then that block; in between its data set is replaced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.training import get_args

LENGTHS = (32, 8, 20, 13, 27)
MAIN = 'if __name__ == "__main__":'

checkout = next(folder for folder in map(Path, sys.path) if (folder / "pretrain_gpt.py").is_file())
definitions, main_block = (checkout / "pretrain_gpt.py").read_text().split(MAIN)
script: dict[str, Any] = {"__name__": "__main__", "__file__": str(checkout / "pretrain_gpt.py")}
exec(compile(definitions, script["__file__"], "exec", dont_inherit=True), script)


class VaryingLengths(MockGPTDataset):
    """Samples cut to the length of their microbatch; everything follows from the index."""

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        length = LENGTHS[(index or 0) // get_args().micro_batch_size % len(LENGTHS)]
        return {
            name: value[:, :length, :length] if name == "attention_mask" else value[:length].contiguous() for name, value in sample.items()
        }


script.update(MockGPTDataset=VaryingLengths)

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"], "start it with one process a rank"
    exec(compile("if True:" + main_block, script["__file__"], "exec", dont_inherit=True), script)
