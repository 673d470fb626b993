"""Names that still work, or once worked, and that no page may teach.

A type checker does not see these: they only warn when called, or are strings.
"""

import ast
from collections.abc import Iterable, Iterator

__all__ = ["find"]

# Fully qualified name → what to write instead.
_NAMES = {
    "torch.cuda.amp": "torch.amp, with the device type as argument",
    "torch.cpu.amp": "torch.amp, with the device type as argument",
    "transformer_engine.pytorch.fp8_autocast": "te.autocast(recipe=...)",
    "transformer_engine.pytorch.fp8_model_init": "te.quantized_model_init",
    "pytorch_lightning": "lightning.pytorch",
    "lightning.pytorch.plugins.MixedPrecisionPlugin": "MixedPrecision",
    "lightning.pytorch.plugins.HalfPrecisionPlugin": "HalfPrecision",
    "lightning.pytorch.plugins.DoublePrecisionPlugin": "DoublePrecision",
    "apex.amp": "torch.amp",
    "torch.set_default_tensor_type": "torch.set_default_dtype",
    "torch.get_autocast_gpu_dtype": "torch.get_autocast_dtype('cuda')",
    "torch.set_autocast_gpu_dtype": "torch.set_autocast_dtype('cuda', ...)",
    "nemo.collections.llm": "Megatron-Bridge (it left NeMo with release 3.0)",
}

# Argument → (values that are meant, None for any; what to write instead).
_ARGUMENTS = {
    "precision": (
        {16, 32, 64, "16", "32", "64", "bf16"},
        "the full name, such as '16-mixed' or 'bf16-true'",
    ),
    "gpus": (None, "accelerator='gpu', devices=..."),
    "amp_backend": (None, "precision='16-mixed'"),
    "amp_level": (None, "precision='16-mixed'"),
    "fp8_recipe": (None, "recipe=, with te.autocast"),
    "fp8_params": (None, "fp8_param_gather="),
}
_TAKE_ARGUMENTS = {
    "Trainer": ("precision", "gpus", "amp_backend", "amp_level"),
    "Fabric": ("precision", "gpus"),
    "autocast": ("fp8_recipe",),
    "MegatronMixedPrecision": ("fp8_params",),
}


def find(parts: Iterable[tuple[int, ast.Module]]) -> Iterator[tuple[int, int, str]]:
    """Yield (number of the part, line, message) for each such name in some code.

    Args:
        parts: The code of a group of blocks in order: first lines and syntax trees.
    """
    aliases: dict[str, str] = {}
    for number, (start, tree) in enumerate(parts):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    aliases[local] = alias.name if alias.asname else local
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    local = alias.asname or alias.name
                    aliases[local] = f"{node.module}.{alias.name}"
        seen: set[int] = set()
        for node in ast.walk(tree):
            for name in _named(node, aliases):
                line = start + getattr(node, "lineno", 1) - 1
                for old, new in _NAMES.items():
                    is_old = name == old or name.startswith(f"{old}.")
                    if is_old and line not in seen:
                        seen.add(line)
                        yield number, line, f"{old} is deprecated: write {new}"
            if isinstance(node, ast.Call):
                for line, text in _arguments(node, start):
                    yield number, line, text


def _named(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute | ast.Name):
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            parts.append(aliases.get(inner.id, inner.id))
            yield ".".join(reversed(parts))


def _arguments(node: ast.Call, start: int) -> Iterator[tuple[int, str]]:
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    for keyword in node.keywords:
        if keyword.arg not in _TAKE_ARGUMENTS.get(called, ()):
            continue
        values, new = _ARGUMENTS[keyword.arg]
        value = getattr(keyword.value, "value", None)
        if values is None or (isinstance(value, int | str) and value in values):
            line = start + keyword.value.lineno - 1
            yield line, f"{keyword.arg}={value!r} is deprecated: write {new}"
