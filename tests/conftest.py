"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# Kernels compile on their first call: a deadline would measure that.
settings.register_profile("no-deadline", deadline=None)
# For tests/thorough alone: other property tests name their own number of cases.
settings.register_profile("thorough", deadline=None, max_examples=20_000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("long", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "no-deadline"))

# The user's kept cuts are none of the tests' business; in this folder nothing can be kept.
os.environ["MEGATRON_DIP_CACHE"] = os.devnull

# Tables are as wide as they are in a file; workers of pytest-xdist say that the terminal has 80 columns.
os.environ.pop("COLUMNS", None)
