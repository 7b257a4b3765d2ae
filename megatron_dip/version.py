"""Version of the package, read by setup."""

__version__ = "0.1.0"
