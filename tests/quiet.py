"""Import what talks and warns while it is imported."""

import contextlib
import importlib
import io
import logging
import warnings
from types import ModuleType

__all__ = ["quiet_import"]


def quiet_import(name: str) -> ModuleType:
    """Return the module ``name``; what its import says, logs or warns goes nowhere."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(level)
