"""Run programs written for Transformer Engine, and Lightning's plugin, without a GPU.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

One line, at the top of ``conftest.py`` or of the program::

    fp8.install()

While it is installed, ``import transformer_engine.pytorch as te`` and its submodules
give the emulator, ``importlib.metadata`` finds a Transformer Engine, and Lightning's
``precision="transformer-engine"`` runs unmodified. `uninstall` and the end of
``with installed():`` put everything back.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_install.py, tests/test_fp8_lightning.py
    Sources: NVIDIA, Transformer Engine 2.20.2, 2026 (Apache-2.0): which module has
             which name;
             Lightning 2.6.6, 2026, ``plugins/precision/transformer_engine.py``: what
             it asks for;
             Python 3.11, "The import system", sections 5.3 to 5.5.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import difflib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import recipe as _recipe
from . import state as _state

__all__ = ["install", "installed", "uninstall"]

_TE = "transformer_engine"
_EMULATOR = __name__.rpartition(".")[0]
# The names, signatures and defaults are those of this release. The label after "+" says
# that it is not NVIDIA's; like the label of a build from source it satisfies any
# requirement that the release does (PEP 440, "local version identifiers").
_VERSION = "2.20.2+emulated"

# The module that defines a name in Transformer Engine: classes carry it while the
# emulator is installed. A name that the emulator lacks is left out.
_RECIPES = tuple(_recipe.__all__)
_HOMES: dict[str, tuple[str, ...]] = {
    "common.recipe": (*_RECIPES, "_FormatHelper"),
    "pytorch.attention.dot_product_attention.dot_product_attention": (
        "DotProductAttention",
    ),
    "pytorch.attention.multi_head_attention": ("MultiheadAttention",),
    "pytorch.attention.rope": ("RotaryPositionEmbedding", "apply_rotary_pos_emb"),
    "pytorch.constants": ("DType",),
    "pytorch.distributed": (
        "checkpoint",
        "in_fp8_activation_recompute_phase",
        "is_fp8_activation_recompute_enabled",
    ),
    "pytorch.module.base": ("TransformerEngineBaseModule",),
    "pytorch.module.layernorm": ("LayerNorm",),
    "pytorch.module.layernorm_linear": ("LayerNormLinear",),
    "pytorch.module.layernorm_mlp": ("LayerNormMLP",),
    "pytorch.module.linear": ("Linear",),
    "pytorch.module.rmsnorm": ("RMSNorm",),
    "pytorch.quantization": (
        "DelayedScalingRequest",
        "FP8GlobalStateManager",
        "QuantizerRequest",
        "QuantizerRole",
        "_default_sf_compute",
        "autocast",
        "check_fp8_block_scaling_support",
        "check_fp8_support",
        "check_mxfp8_support",
        "check_nvfp4_support",
        "check_recipe_support",
        "fp8_autocast",
        "fp8_model_init",
        "get_align_size_for_quantization",
        "get_default_fp8_recipe",
        "get_default_recipe",
        "get_fp8_max",
        "get_fp8_te_dtype",
        "get_fp8_torch_dtype",
        "is_fp8_available",
        "is_fp8_block_scaling_available",
        "is_mxfp8_available",
        "is_nvfp4_available",
        "quantized_model_init",
    ),
    "pytorch.quantized_tensor": ("QuantizedTensor", "Quantizer"),
    "pytorch.tensor.float8_blockwise_tensor": (
        "Float8BlockQuantizer",
        "Float8BlockwiseQTensor",
    ),
    "pytorch.tensor.float8_tensor": (
        "Float8CurrentScalingQuantizer",
        "Float8Quantizer",
        "Float8Tensor",
    ),
    "pytorch.tensor.identity_tensor": ("IdentityQuantizer", "IdentityTensor"),
    "pytorch.tensor.mxfp8_tensor": ("MXFP8Quantizer", "MXFP8Tensor"),
    "pytorch.tensor.nvfp4_tensor": ("NVFP4Quantizer", "NVFP4Tensor"),
    "pytorch.transformer": ("TransformerLayer",),
    "pytorch.utils": (
        "get_default_init_method",
        "get_device_compute_capability",
        "init_method_constant",
        "init_method_normal",
        "is_bf16_available",
        "is_bf16_compatible",
        "scaled_init_method_normal",
    ),
}
# Where else each name can be had: modules that only pass names on.
_MODULES = (
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
)
_ATTENTION = ("DotProductAttention", "MultiheadAttention", "RotaryPositionEmbedding")
_TENSORS = (
    "Float8BlockQuantizer",
    "Float8BlockwiseQTensor",
    "Float8CurrentScalingQuantizer",
    "Float8Quantizer",
    "Float8Tensor",
    "IdentityQuantizer",
    "IdentityTensor",
    "MXFP8Quantizer",
    "MXFP8Tensor",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "QuantizedTensor",
    "Quantizer",
)
_INNER = tuple(name for name in _RECIPES if name not in ("MMParams", "QParams"))
_OLD = (
    "FP8GlobalStateManager",
    "_default_sf_compute",
    "fp8_autocast",
    "fp8_model_init",
    "get_default_fp8_recipe",
    "get_fp8_max",
    "get_fp8_te_dtype",
    "get_fp8_torch_dtype",
    *(n for n in _HOMES["pytorch.quantization"] if n.startswith("check_")),
)
_REQUESTS = ("DelayedScalingRequest", "QuantizerRequest", "QuantizerRole")
_PASSED_ON: dict[str, tuple[str, ...]] = {
    "": (),
    "common": (),
    "pytorch": (
        *_MODULES,
        *_ATTENTION,
        *_TENSORS,
        "DType",
        "TransformerLayer",
        "checkpoint",
        *_REQUESTS,
        *(name for name in _state.__all__ if name not in _state.NOT_OF_TE),
    ),
    "pytorch.attention": _ATTENTION,
    "pytorch.attention.dot_product_attention": ("DotProductAttention",),
    "pytorch.fp8": (*_INNER, *_OLD),
    "pytorch.module": _MODULES,
    "pytorch.constants": ("TE_DType", "TE_DType_To_Torch"),
    "pytorch.float8_tensor": ("Float8Tensor",),
    "pytorch.quantization": _INNER,
    "pytorch.tensor": _TENSORS,
}
# Imported only when asked for: importing them warns.
_LATER = {
    "pytorch.fp8": "Using deprecated internal API from Transformer Engine. "
    "transformer_engine.pytorch.fp8 will be removed in a future release.",
    "pytorch.float8_tensor": "transformer_engine.pytorch.float8_tensor is deprecated "
    "and will be removed in a future release. Float8Tensor should be imported directly "
    "through `from transformer_engine.pytorch import Float8Tensor`",
}


def _emulated() -> dict[str, Any]:
    """Return what the emulator offers of Transformer Engine's names."""
    files = (
        "checkpoint",
        "extra_state",
        "linear",
        "quantizers",
        "scaling",
        "slots",
        "state",
        "tensor",
    )
    spaces = [vars(sys.modules[_EMULATOR])]
    spaces += [vars(sys.modules[f"{_EMULATOR}.{file}"]) for file in files]
    found = {
        "_FormatHelper": _recipe._FormatHelper,
        "check_fp8_block_scaling_support": _state._block_support,
        "check_fp8_support": _state._fp8_support,
        "check_mxfp8_support": _state._mxfp8_support,
        "check_nvfp4_support": _state._nvfp4_support,
        "get_default_fp8_recipe": _state.get_default_recipe,
        "TransformerEngineBaseModule": sys.modules[
            f"{_EMULATOR}.base"
        ].TransformerEngineBaseModule,
    }
    every = (*_HOMES.values(), *_PASSED_ON.values())
    for name in {name for names in every for name in names} - found.keys():
        for space in spaces:
            if name in space:
                found[name] = space[name]
                break
    return found


# ------------------------------------------------------------------------- the doors


def install() -> None:
    """Make ``import transformer_engine`` give the emulator until :func:`uninstall`.

    Calling it again changes nothing. Where there is no CUDA device, it also turns
    ``torch.autocast("cuda")`` into ``torch.autocast("cpu")`` with the dtype that it
    would have on CUDA; PyTorch alone would warn and switch it off, and a layer's output
    would have another dtype than on the GPU. The two do not list the same operations:
    ``softmax`` and ``layer_norm``, for instance, are in float32 under CUDA's autocast
    and in bfloat16 under the CPU's.

    It has effect in this process. One that is spawned (not forked) by it needs a call
    of its own, as in a file that it imports.

    Raises:
        RuntimeError: Transformer Engine is installed here and works, or another copy
            of the emulator is installed.
    """
    with _lock:
        _begin()
        _holders.kept = True


def uninstall() -> None:
    """Undo :func:`install`: the names mean what they meant before.

    Modules that were imported meanwhile keep the emulator that they have found. Inside
    ``with installed():`` it takes effect at the end of the block. Calling it without
    :func:`install` changes nothing.
    """
    with _lock:
        _holders.kept = False
        _end()


@contextmanager
def installed() -> Iterator[None]:
    """Install the emulator for a ``with`` block, or for a function that it decorates.

    Blocks may be nested and may overlap in threads: the last to end puts back what the
    first had changed, unless :func:`install` was called.

    Raises:
        RuntimeError: as :func:`install`.

    Example:
        >>> with installed():
        ...     from transformer_engine.common.recipe import DelayedScaling
        >>> DelayedScaling().amax_history_len
        1024
    """
    with _lock:
        _begin()
        _holders.blocks += 1
    try:
        yield
    finally:
        with _lock:
            _holders.blocks -= 1
            _end()


class _Holders:
    """Who wants the emulator to be installed, and how to undo it."""

    kept = False
    blocks = 0
    undo: ExitStack | None = None


_holders = _Holders()
_lock = threading.RLock()


def _begin() -> None:
    if _holders.undo is not None:
        return
    for finder in sys.meta_path:
        if getattr(finder, "emulates", None) == _TE:
            raise RuntimeError(
                f"another copy of the emulator is installed: "
                f"{type(finder).__module__}. Uninstall it first."
            )
    _refuse_to_shadow()
    with ExitStack() as undo:
        _take_modules(undo)
        _answer_imports(undo)
        _name_classes(undo)
        _forget_answers(undo)
        _redirect_autocast(undo)
        _holders.undo = undo.pop_all()


def _end() -> None:
    if _holders.undo is not None and not _holders.kept and not _holders.blocks:
        undo, _holders.undo = _holders.undo, None
        undo.close()


# ------------------------------------------------------------------ what is changed


def _modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == _TE]


def _refuse_to_shadow() -> None:
    """Do nothing if no Transformer Engine imports here or no GPU could run it.

    Raises:
        RuntimeError: one does.
    """
    if not torch.cuda.is_available():
        return
    before = {name: sys.modules[name] for name in _modules()}
    try:
        importlib.import_module(f"{_TE}.pytorch")
    except Exception:  # whatever it is: this Transformer Engine does not work
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)
        return
    raise RuntimeError(
        f"Transformer Engine {importlib.metadata.version(_TE)} works here, on "
        f"{torch.cuda.get_device_name()}: the emulator does not take its place. Call "
        "install() only `if not torch.cuda.is_available()`, or use the emulator by its "
        f"own name, {_EMULATOR}."
    )


def _take_modules(undo: ExitStack) -> None:
    """Take the modules of a Transformer Engine that does not work out of the way."""
    before = {name: sys.modules.pop(name) for name in _modules()}

    def put_back() -> None:
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)

    undo.callback(put_back)


def _answer_imports(undo: ExitStack) -> None:
    """Find the emulated modules, and a distribution that provides them."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)

    def remove() -> None:
        sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]

    undo.callback(remove)


def _name_classes(undo: ExitStack) -> None:
    """Give classes the ``__module__`` that they have in Transformer Engine.

    Lightning recognizes a converted model by it, and recipes are pickled under it.
    """
    emulated = _emulated()
    for home, names in _HOMES.items():
        for name in names:
            made = emulated.get(name)
            if isinstance(made, type):
                undo.callback(setattr, made, "__module__", made.__module__)
                made.__module__ = f"{_TE}.{home}"


def _forget_answers(undo: ExitStack) -> None:
    """Let Lightning ask again whether there is a Transformer Engine, then and after."""
    before = [(cache, dict(vars(cache))) for cache in _requirement_caches()]

    def forget() -> None:
        for cache in _requirement_caches():
            for answer in ("available", "message"):
                vars(cache).pop(answer, None)
        imports = sys.modules.get("lightning_utilities.core.imports")
        for name in ("package_available", "module_available"):
            clear = getattr(getattr(imports, name, None), "cache_clear", None)
            if clear is not None:
                clear()

    def put_back() -> None:
        forget()
        for cache, values in before:
            vars(cache).clear()
            vars(cache).update(values)

    undo.callback(put_back)
    forget()


def _requirement_caches() -> list[Any]:
    """Return the ``RequirementCache`` objects of all modules that ask for it."""
    imports = sys.modules.get("lightning_utilities.core.imports")
    kind = getattr(imports, "RequirementCache", None)
    if kind is None:
        return []
    found = {
        id(value): value
        for module in list(sys.modules.values())
        for value in list(getattr(module, "__dict__", {}).values())
        if issubclass(type(value), kind)  # isinstance() would ask proxies
    }
    about = re.compile(r"transformer[-_.]engine\b", re.IGNORECASE)
    return [
        cache
        for cache in found.values()
        if any(about.match(text) for text in (cache.requirement, cache.module) if text)
    ]


def _redirect_autocast(undo: ExitStack) -> None:
    """Let ``torch.autocast("cuda")`` act on the CPU where there is no CUDA device.

    CUDA's own switch is set beside it: ``torch.is_autocast_enabled()`` asks for it
    (torch.nn.TransformerEncoderLayer does, before it takes a path without FP8).
    """
    kind: Any = torch.autocast
    methods = {name: vars(kind)[name] for name in ("__init__", "__enter__", "__exit__")}

    @functools.wraps(methods["__init__"])
    def init(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type == "cuda" and not torch.cuda.is_available():
            device_type = "cpu"
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
            self._as_cuda = (enabled, dtype)
            # To float32 it casts nothing in a float32 model; the CPU's refuses it.
            enabled = enabled and dtype != torch.float32
            dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        methods["__init__"](self, device_type, dtype, enabled, cache_enabled)

    @functools.wraps(methods["__enter__"])
    def enter(self: Any) -> Any:
        if hasattr(self, "_as_cuda"):
            self._cuda_before = _cuda_autocast()
            _set_cuda_autocast(*self._as_cuda)
        return methods["__enter__"](self)

    @functools.wraps(methods["__exit__"])
    def leave(self: Any, *error: Any) -> Any:
        if hasattr(self, "_as_cuda"):
            _set_cuda_autocast(*self._cuda_before)
        return methods["__exit__"](self, *error)

    for name, method in methods.items():
        undo.callback(setattr, kind, name, method)
    kind.__init__, kind.__enter__, kind.__exit__ = init, enter, leave


def _cuda_autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _set_cuda_autocast(enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


# ------------------------------------------------------- modules and the distribution


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the emulated modules before the path is searched."""

    emulates = _TE

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of an emulated module, None for other packages' modules.

        Raises:
            ModuleNotFoundError: a module or name of Transformer Engine's that is not
                emulated. It carries no ``name``: `from package import name` would
                replace an error that names the missing module by a shorter one.
        """
        top, _, inner = fullname.partition(".")
        if top != _TE:
            return None
        if inner not in _HOMES and inner not in _PASSED_ON:
            raise ModuleNotFoundError(_missing(*fullname.rpartition(".")[::2]))
        spec = importlib.machinery.ModuleSpec(
            fullname, _Loader(inner), origin=_source_of(inner), is_package=True
        )
        spec.has_location = True
        return spec

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the emulated distribution if it is asked for."""
        name = None if context is None else context.name
        if name is None or re.sub(r"[-_.]+", "_", name).lower() == _TE:
            return [_Distribution()]
        return []


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of the emulator."""

    def read_text(self, filename: str) -> str | None:
        """Return the text of a metadata file, None if there is none."""
        texts = {
            "METADATA": "Metadata-Version: 2.1\n"
            f"Name: {_TE}\nVersion: {_VERSION}\n"
            f"Summary: Transformer Engine, emulated by {_EMULATOR}\n",
            "top_level.txt": f"{_TE}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        """Return where a file of the emulator is."""
        return Path(__file__).with_name(str(path))


class _Loader(importlib.abc.Loader):
    """Fills a module with the emulated names that it has in Transformer Engine."""

    def __init__(self, inner: str) -> None:
        """Remember the module's name without ``transformer_engine.``."""
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave making an empty module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module and import what comes with it."""
        emulated = _emulated()
        names = (*_HOMES.get(self.inner, ()), *_PASSED_ON.get(self.inner, ()))
        space = vars(module)
        space["__path__"] = []  # nothing else is to be found inside
        space["__doc__"] = f"Emulated by {_EMULATOR}."
        space["__getattr__"] = functools.partial(_no_such_name, module)
        for name in names:
            if name in emulated:
                space[name] = emulated[name]
        if not self.inner:
            space["__version__"] = _VERSION
        if self.inner in _LATER:
            warnings.warn(
                _LATER[self.inner],
                DeprecationWarning,
                stacklevel=2,  # the frames of the import itself are not counted
            )
        for inner in (*_PASSED_ON, *_HOMES):
            if _child(inner, self.inner) and inner not in _LATER:
                importlib.import_module(f"{_TE}.{inner}")


def _source_of(inner: str) -> str:
    """Return the emulator's file that stands for a module of Transformer Engine."""
    emulated = _emulated()
    for name in _HOMES.get(inner, ()):
        made = emulated.get(name)
        code = getattr(getattr(made, "__init__", made), "__code__", None)
        if code is not None and Path(code.co_filename).parent == Path(__file__).parent:
            return str(code.co_filename)
    return str(Path(__file__).with_name("__init__.py"))


def _no_such_name(module: ModuleType, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    raise AttributeError(_missing(module.__name__, name), name=name, obj=module)


def _missing(module: str, name: str) -> str:
    """Say that a name is not emulated, and what is."""
    inner = module.removeprefix(_TE).removeprefix(".")
    emulated = _emulated()
    offered = [*_HOMES.get(inner, ()), *_PASSED_ON.get(inner, ())]
    offered = [other for other in offered if other in emulated]
    offered += [c for c in map(_child, (*_HOMES, *_PASSED_ON), repeat(inner)) if c]
    near = difflib.get_close_matches(name, offered, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{module}.{name} is not emulated by {_EMULATOR}.{hint} `dir({module})` lists "
        f"what is, of Transformer Engine {_VERSION.partition('+')[0]}."
    )


def _child(inner: str, parent: str) -> str | None:
    """Return the last part of ``inner`` if it is a module right inside ``parent``."""
    before, _, last = inner.rpartition(".")
    return last if last and before == parent else None
