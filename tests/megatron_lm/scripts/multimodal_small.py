"""examples/multimodal/train.py of the checkout with small vision and language models: its other parts are its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

checkout = next(folder for folder in map(Path, sys.path) if (folder / "pretrain_vlm.py").is_file())
SCRIPT = checkout / "examples/multimodal/train.py"
sys.path.insert(0, str(SCRIPT.parent))

import config as sizes  # noqa: E402 (of the script's folder)


def small(stock: Any, **changes: Any) -> Any:
    def get_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        config = stock(config, *args, **kwargs)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    return get_config


sizes.get_vision_model_config = small(
    sizes.get_vision_model_config, num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, kv_channels=8, num_query_groups=4,
)
sizes.get_language_model_config = small(sizes.get_language_model_config, ffn_hidden_size=128)
sizes.get_vision_projection_config = small(sizes.get_vision_projection_config, ffn_hidden_size=64)


def run(**beside: Any) -> None:
    """The script, with these names beside its own."""
    assert os.environ["WORLD_SIZE"], "start it with one process a rank"
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec", dont_inherit=True), {"__name__": "__main__", "__file__": str(SCRIPT), **beside})
