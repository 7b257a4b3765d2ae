"""Whose order of stages a run under DIP's executor takes; needs no other package, since commands list the names in their help."""

from __future__ import annotations

from typing import Literal

OrderName = Literal["dip", "1f1b", "interleaved", "optimus", "three-phase", "entrain"]
"""``dip``: searched; others: by their rule (:mod:`megatron_dip.schedule.rules`)."""
