"""Set-up of megatron_dip; everything but the packages is declared in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # patches/ stands at the root of the repository, where people look for it, and travels in the wheel as package data.
    packages=[*find_packages(include=["megatron_dip", "megatron_dip.*"]), "megatron_dip.patches"],
    package_dir={"megatron_dip.patches": "patches"},
)
