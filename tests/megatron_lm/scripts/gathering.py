"""The layers of tests/distributed/context_attention.py for ``--spec gathering LAYER`` or ``EXPERTS``. LLaVAModel takes it as soon as this is imported.

A checkout has a package ``tests`` of its own, which stands before this project's where its scripts run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("context_attention", Path(__file__).parents[2] / "distributed/context_attention.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
_module.let_llava_take_it()
LAYER, EXPERTS = _module.LAYER, _module.EXPERTS
