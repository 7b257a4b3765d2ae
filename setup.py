"""Set-up of megatron_dip; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
