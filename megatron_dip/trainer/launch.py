"""What the process that starts the ranks can know to be wrong before any of them loads torch: one message at once instead of one a rank."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import ExampleConfig, RunSettings

_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's driver, AMD's, and Windows' under Linux; a machine with none has nothing that torch calls CUDA."""


def check_launch(example: Path, config: ExampleConfig, settings: RunSettings, needed: Sequence[str]) -> None:
    """Raises InputError for a run that no rank can begin.

    Args:
        needed: packages that the ranks import.
    """
    for name in needed:
        if find_spec(name.partition(".")[0]) is None:
            raise InputError(name, None, "is not installed, and training needs it", "pip install 'megatron-dip[train]'")
    if not (example / "example.py").is_file():
        raise InputError("EXAMPLE", str(example), "has no example.py", "name a folder such as examples/vlm/digits")
    if settings.device == "cuda" and not any(Path(device).exists() for device in _ACCELERATORS):
        raise InputError("--device", settings.device, "this machine has no CUDA device", "use --device cpu")
    if settings.schedule.partition is not None:
        layers = {module.name: module.num_layers for module in config.model.modules.modules}
        settings.schedule.partition.validate(layers, settings.parallel.pipeline, "--partition")
