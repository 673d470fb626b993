"""Tests of snippets/fp8: the names that it offers, and that a copy stands alone."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snippets import fp8 as te
from tests import te_source

FOLDER = Path(te.__file__).parent
# The functions and contexts whose signatures are Transformer Engine's; those of the
# modules are in test_fp8_modules.py, of the recipes in test_fp8_recipe.py.
SIGNATURES = {
    "autocast": "pytorch/quantization.py",
    "checkpoint": "pytorch/distributed.py",
    "fp8_autocast": "pytorch/quantization.py",
    "fp8_model_init": "pytorch/quantization.py",
    "get_default_recipe": "pytorch/quantization.py",
    "is_fp8_available": "pytorch/quantization.py",
    "is_fp8_block_scaling_available": "pytorch/quantization.py",
    "is_mxfp8_available": "pytorch/quantization.py",
    "is_nvfp4_available": "pytorch/quantization.py",
    "quantized_model_init": "pytorch/quantization.py",
}


def parameters_of(name: str, file: str) -> list[tuple[str, str]]:
    """Read the parameters and defaults of a function or class from the source."""
    tree = ast.parse(te_source.folder().joinpath(file).read_text("utf-8"))
    found = next(
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    )
    if isinstance(found, ast.ClassDef):
        found = next(
            node
            for node in found.body
            if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        )
    arguments = found.args
    named = [*arguments.args, *arguments.kwonlyargs]
    required = len(arguments.args) - len(arguments.defaults)
    defaults = ["" for _ in range(required)]
    defaults += [ast.unparse(d) for d in arguments.defaults]
    defaults += [ast.unparse(d) if d else "" for d in arguments.kw_defaults]
    pairs = [(a.arg, d) for a, d in zip(named, defaults, strict=True)]
    return [pair for pair in pairs if pair[0] != "self"]


@pytest.mark.parametrize(("name", "file"), SIGNATURES.items())
def test_functions_have_transformer_engine_s_signatures(name: str, file: str) -> None:
    """Names, order and defaults, read from its source."""
    ours = [
        (p.name, "" if p.default is p.empty else repr(p.default))
        for p in inspect.signature(getattr(te, name)).parameters.values()
        if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]

    assert ours == parameters_of(name, file)


def test_every_public_name_is_described() -> None:
    """It is there, and has a docstring of its own."""
    for name in te.__all__:
        value = getattr(te, name)
        assert value.__doc__, name
    assert te.__all__ == sorted(te.__all__)


def test_a_name_that_is_not_emulated_is_told() -> None:
    """Not as a plain "has no attribute"."""
    with pytest.raises(AttributeError, match=r"GroupedLinear.*not emulated"):
        te.GroupedLinear  # noqa: B018


def test_every_file_is_headed_and_imports_torch_only() -> None:
    """So that the folder can be copied under any name, and says where it is from."""
    for file in FOLDER.glob("*.py"):
        text = file.read_text("utf-8")
        tree = ast.parse(text)
        about = ast.get_docstring(tree) or ""
        assert "into your project; it needs only ``torch``." in about, file
        assert "SPDX-License-Identifier: Apache-2.0" in about, file
        for named in about.partition("Tests:")[2].partition("Sources:")[0].split(","):
            path = FOLDER.parents[1] / named.strip()
            assert path.is_file(), f"{file.name} names {named.strip()}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                top = str(node.module).partition(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names, file


def test_a_copy_under_another_name_trains(tmp_path: Path) -> None:
    """In an empty folder, in a process that sees nothing of this project."""
    shutil.copytree(FOLDER, tmp_path / "eight_bits")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import eight_bits
eight_bits.install()
import torch
import transformer_engine.pytorch as te
layer = te.Linear(16, 16)
with te.autocast():
    layer(torch.randn(16, 16)).sum().backward()
assert layer.weight.grad is not None
assert layer.fp8_meta["scaling_fwd"].scale[0] != 1
eight_bits.uninstall()
assert not [n for n in sys.modules if n.startswith(("snippets", "transformer_engine"))]
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_the_modules_of_the_folder_import_alone() -> None:
    """None needs another to be imported first."""
    for file in sorted(FOLDER.glob("[a-z]*.py")):
        importlib.import_module(f"snippets.fp8.{file.stem}")
