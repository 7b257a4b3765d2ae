"""Imports torchvision beside a torch that it was not built for (a CPU's, where packages are built for CUDA).

Its compiled operators cannot be loaded then, and it asks for two of them when it is imported. They are declared here, without a kernel:
what loads and augments images runs none of them.
"""

from __future__ import annotations

from torch import library

try:
    import torchvision
except RuntimeError:
    operators = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
