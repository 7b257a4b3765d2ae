"""Releases from 0.18 on ask for Python 3.12, of which what the tests run needs typing.override alone: there for Python 3.11."""

import typing

if not hasattr(typing, "override"):
    typing.override = lambda function: function  # type: ignore[attr-defined]
