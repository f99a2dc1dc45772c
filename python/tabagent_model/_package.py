"""Packages that only some users need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import MissingPackageError


def package(name: str, install: str) -> Any:
    """Import it, or say how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        message = f"this needs the package `{error.name or name}`, which is not installed"
        raise MissingPackageError(message, hint=f"pip install {install}") from None
