"""Settings of all tests."""

from hypothesis import settings

# Kernels compile on their first call: a deadline would measure that.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
