"""Functions that tables name as `module:function`, imported when they are needed."""

from importlib import import_module
from typing import Any


def import_function(path: str) -> Any:
    """Import the function `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
