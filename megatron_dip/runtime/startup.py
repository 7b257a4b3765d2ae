"""What must hold of a CUDA device and of NCCL before programs run on them: checked, and set where that is still possible.

In: the process's environment, the default process group. Out: :class:`DeviceSettings`, or an error. No torch at import, and no CUDA call.

* ``CUDA_DEVICE_MAX_CONNECTIONS`` may be anything: programs hang on no number of hardware queues (:mod:`megatron_dip.program.dry_run` says
  what was proved). Megatron asserts 1 for tensor or context parallelism before Blackwell; with 1 plans are scored for it.
* NCCL must not be initialised eagerly (``device_id`` given to init_process_group): all unbatched messages of a group then go through one
  communicator (pytorch#132900), channels wait for each other, and programs hang. Refused.
* ``CUDA_MODULE_LOADING`` should be EAGER: by default a kernel is loaded at its first launch, which may wait for the device while a receive on
  it waits for a message that this host has yet to send. It counts when CUDA starts, so it is set before, and asked for after.
* ``NCCL_MAX_P2P_NCHANNELS`` bounds the multiprocessors that a waiting receive occupies. Not changed, but told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from megatron_dip.spec.errors import InputError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MODULE_LOADING = "CUDA_MODULE_LOADING"
P2P_CHANNELS = "NCCL_MAX_P2P_NCHANNELS"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """What a run's environment says of its devices."""

    hardware_queues: int | None
    """None = CUDA's default"""
    loads_eagerly: bool
    """Whether all kernels are loaded before the first launch"""
    p2p_channels: str | None
    """Of one message, as given to NCCL; None = NCCL's choice"""

    def describe(self) -> str:
        """One line for the log."""
        parts = [
            f"{CONNECTIONS}={self.hardware_queues if self.hardware_queues is not None else 'default'}",
            f"{MODULE_LOADING}={'EAGER' if self.loads_eagerly else 'LAZY'}", f"{P2P_CHANNELS}={self.p2p_channels or 'default'}",
        ]
        if not self.loads_eagerly:
            parts.append(f"export {MODULE_LOADING}=EAGER: a kernel that is loaded while a receive waits may hold the first iteration up for ever")
        return " [DIP] device: " + ", ".join(parts)


def hardware_queues(environment: Mapping[str, str] = os.environ) -> int | None:
    """``CUDA_DEVICE_MAX_CONNECTIONS``; None where it is not set. Raises InputError where it is no number from 1 to 32."""
    text = environment.get(CONNECTIONS)
    if text is None or not text.strip():
        return None
    if not text.strip().isdecimal() or not 1 <= int(text) <= 32:
        raise InputError(CONNECTIONS, text, "is no number from 1 to 32", f"export {CONNECTIONS}=1, which Megatron-LM asks for, or unset it")
    return int(text)


def load_kernels_eagerly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks CUDA to load all kernels when it starts, unless the user has said otherwise. Without effect once CUDA runs."""
    environment.setdefault(MODULE_LOADING, "EAGER")


def check_start(default_group: Any, *, cuda_runs: bool, environment: MutableMapping[str, str] = os.environ) -> DeviceSettings:
    """Looks at everything before the groups of messages over NCCL are made.

    Args:
        default_group: torch's default process group.
        cuda_runs: whether CUDA has started in this process, so that its variables are read already.

    Raises:
        InputError: NCCL was initialised eagerly, or a variable has a value that it cannot have.
    """
    bound = getattr(default_group, "bound_device_id", None)
    if bound is not None:
        raise InputError(
            "init_process_group(device_id=...)", str(bound),
            "initialises NCCL eagerly: all messages of a group then go through one communicator (pytorch#132900), and pipeline ranks that "
            "have several messages under way wait for each other for ever",
            "leave device_id out, and Megatron-LM's in-process restart with it",
        )
    if not cuda_runs:
        load_kernels_eagerly(environment)
    return DeviceSettings(
        hardware_queues=hardware_queues(environment), loads_eagerly=environment.get(MODULE_LOADING, "LAZY").upper() == "EAGER",
        p2p_channels=environment.get(P2P_CHANNELS),
    )
