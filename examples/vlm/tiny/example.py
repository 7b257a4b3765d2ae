"""The digits example with a model so small that an iteration takes a tenth of a second on a CPU: for trying out runs, not for reading digits."""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parents[1] / "digits" / "example.py"
_spec = importlib.util.spec_from_file_location("megatron_dip_digits", _FILE)
assert _spec is not None
assert _spec.loader is not None
digits = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = digits
_spec.loader.exec_module(digits)

Dataset = digits.Dataset
forward_step = digits.forward_step
evaluation_step = digits.evaluation_step
