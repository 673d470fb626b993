"""Transformer Engine's own Python source, imported without its compiled part.

The wheel ``transformer_engine`` carries the Python of the project, among it references
in plain PyTorch that run anywhere, but none of it imports where the CUDA libraries are
missing. `load` executes the module asked for, and what that needs, with the compiled
part and what only leads to it replaced by stand-ins::

    quantization = te_source.load("pytorch.quantization")

Nothing stays in ``sys.modules``: an ``import transformer_engine`` fails as before, and
one that works is not touched.

SPDX-License-Identifier: Apache-2.0
"""

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from unittest import mock

NAME = "transformer_engine"
# Packages whose __init__ would import everything: their modules are found, it is not
# executed.
_PACKAGES = (
    "",
    ".common",
    ".pytorch",
    ".pytorch.custom_recipes",
    ".pytorch.tensor",
)
_STAND_INS: dict[str, dict[str, object]] = {
    "transformer_engine_torch": {},
    f"{NAME}.pytorch.jit": {"jit_fuser": lambda function: function},
    f"{NAME}.pytorch.utils": {},
    f"{NAME}.pytorch.tensor.utils": {"is_custom": lambda *_: True},
}


class _StandIn(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> mock.MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def folder() -> Path:
    """Return the folder of the installed Transformer Engine, without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(NAME)
    if spec is None or not spec.submodule_search_locations:
        msg = f"no module named {NAME!r}: install requirements.txt"
        raise ModuleNotFoundError(msg)
    return Path(spec.submodule_search_locations[0])


def version() -> str:
    """Return the version of the installed Transformer Engine."""
    return importlib.metadata.version(NAME)


@contextlib.contextmanager
def _without_modules() -> Iterator[None]:
    """Hide the modules of Transformer Engine, and forget those that are imported."""

    def take() -> dict[str, ModuleType]:
        names = [n for n in sys.modules if n.split(".")[0] in {NAME, f"{NAME}_torch"}]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    try:
        yield
    finally:
        take()
        sys.modules.update(before)


def _element_types(top: Path) -> object:
    """Return the element types of the compiled part, which the Python repeats."""
    tree = ast.parse((top / "pytorch" / "constants.py").read_text())
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef))
    body = next(c.body for c in classes if c.name == "DType")
    assigned = [n.targets[0] for n in body if isinstance(n, ast.Assign)]
    names = [n.id for n in assigned if isinstance(n, ast.Name)]
    return IntEnum("DType", names, start=0)


@functools.cache
def load(name: str) -> ModuleType:
    """Return the module ``transformer_engine.<name>``, executed from its source.

    Each call with a new name executes what the module imports again: compare values
    with those of another module, not classes.

    Args:
        name: For example ``"pytorch.custom_recipes.reference_nvfp4"``.

    Returns:
        The module.
    """
    top = folder()
    with _without_modules(), mock.patch.dict(os.environ):
        for package in _PACKAGES:
            module = ModuleType(NAME + package)
            module.__path__ = [str(top.joinpath(*package.split(".")))]
            sys.modules[module.__name__] = module
        for stand_in, attributes in _STAND_INS.items():
            module = _StandIn(stand_in)
            vars(module).update(attributes)
            sys.modules[stand_in] = module
        vars(sys.modules[f"{NAME}_torch"])["DType"] = _element_types(top)
        for variable in [v for v in os.environ if v.startswith("NVTE_")]:
            del os.environ[variable]  # defaults of recipes are read at import
        return importlib.import_module(f"{NAME}.{name}")
