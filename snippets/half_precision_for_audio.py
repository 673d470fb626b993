"""Train in true half precision while the audio waveforms stay in full precision.

Copy this file into your project; it needs only ``torch`` and ``lightning``.

    Guide:   guide/half_precision_for_audio
    Tests:   tests/test_half_precision_for_audio.py
    Sources: NVIDIA 2025, NeMo 3.0.0, ``nemo/utils/trainer_utils.py``: the two names
             and their documented behavior, which is completed here; the guide sets
             both side by side. Lightning AI 2026, Lightning 2.6.6, ``HalfPrecision``.
    Changed: 2026-11-21

SPDX-License-Identifier: Apache-2.0
"""
# ruff: noqa: ANN401 - a batch may be anything

import copy
import dataclasses
import difflib
import sys
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import torch
from lightning.fabric.plugins import HalfPrecision as FabricHalfPrecision
from lightning.fabric.plugins import Precision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import HalfPrecision as TrainerHalfPrecision
from torch import Tensor

__all__ = ["HalfPrecisionForAudio", "full_precision", "resolve_trainer_cfg"]

KeyPath: TypeAlias = tuple[Hashable, ...]
Keep: TypeAlias = str | Iterable[str] | Callable[[KeyPath, Tensor], object]

# What may be asked for, and Lightning's own name for it.
_PRECISIONS = {"16-true": "16-true", "fp16-true": "16-true", "bf16-true": "bf16-true"}

# Values that hold no tensor: most of a batch that is not a tensor is one of these.
_ATOMS = frozenset({str, int, float, bool, complex, bytes, type(None)})

# Sequences that are values, not containers.
_NOT_CONTAINERS = (str, bytes, bytearray, memoryview, range)

# Device types on which autocast may be on.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")

# Remembered answers for keys; far more than the distinct keys of any batch, and a
# bound for batches that are keyed by utterance.
_MAX_REMEMBERED = 1024


class HalfPrecisionForAudio(TrainerHalfPrecision, FabricHalfPrecision):
    """Lightning's ``HalfPrecision``, except that protected tensors are not cast.

    Module, default dtype and outputs are treated as ``HalfPrecision`` does. Of the
    batch, floating-point tensors are cast unless they are protected; a protected
    tensor is passed on as the same object, whatever its dtype. Integers, booleans
    and complex tensors are never touched. Nothing in the batch is modified in place.

    The batch is searched through lists, tuples, named tuples, dataclasses, every
    ``Mapping`` and every ``Sequence``, nested to any depth, and each keeps its type.
    Names of fields count as keys. Any other object, such as a set, a NumPy array or
    an iterator, is passed on as it is.

    One object serves a ``Trainer`` or a ``Fabric``. In Fabric the arguments of
    ``forward`` are the batch, so a keyword counts as a key: ``model(audio=wave)``.

    Args:
        precision: ``"bf16-true"``, or ``"16-true"`` and its NeMo name ``"fp16-true"``.
            The attribute ``precision`` holds Lightning's name.
        keep: What is protected. A string, or several, protect everything under a key
            that contains one of them, upper or lower case; a tuple used as a key
            contains what one of its strings contains, any other key contains nothing.
            A callable gets the path to each floating-point tensor (keys, field names
            and positions, outermost first) and the tensor, and protects it by
            returning something true. In Fabric a path begins ``0, position`` or
            ``1, keyword``, as ``forward(*args, **kwargs)`` is one ``(args, kwargs)``.

    Raises:
        TypeError: ``keep`` is of another type.
        ValueError: ``precision`` is anything else, or ``keep`` holds an empty string,
            which every key contains.

    Example:
        >>> plugin = HalfPrecisionForAudio("bf16-true", keep=("audio", "signal"))
        >>> batch = {"input_signal": torch.ones(2), "speaker": [torch.ones(3)]}
        >>> converted = plugin.convert_input(batch)
        >>> converted["input_signal"] is batch["input_signal"]
        True
        >>> converted["speaker"][0].dtype
        torch.bfloat16
    """

    def __init__(self, precision: str = "16-true", keep: Keep = "audio") -> None:
        super().__init__(_lightning_name(precision))  # type: ignore[arg-type]
        self._predicate: Callable[[KeyPath, Tensor], object] | None = None
        self._protects = _Protection(())
        if callable(keep):
            self._predicate = keep
        else:
            self._protects = _Protection(_checked_substrings(keep))

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors of a batch that are not protected.

        Args:
            data: The batch, of any structure.

        Returns:
            The same structure. Dictionaries and lists on the way to a tensor are new;
            a container under a protected key, or without anything to cast, may be
            the same object.

        Raises:
            TypeError: A container with something to cast cannot be rebuilt.
            ValueError: The batch contains itself.
        """  # noqa: DOC502 - the TypeError comes from _with_changes
        try:
            return self._convert(data, ())
        except RecursionError as error:
            msg = "the batch is nested too deeply to convert; does it contain itself?"
            raise ValueError(msg) from error

    def _convert(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                return value
            if self._predicate is not None and self._predicate(path, value):
                return value
            return value.to(self._desired_input_dtype)
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is dict:
            protects = self._protects
            return {
                key: item if protects[key] else self._convert(item, (*path, key))
                for key, item in value.items()
            }
        if kind is list or kind is tuple:
            return kind([
                self._convert(item, (*path, i)) for i, item in enumerate(value)
            ])
        return self._convert_other(value, path)

    def _convert_other(self, value: Any, path: KeyPath) -> Any:
        """Convert a container whose class is the user's, by changing what changes."""
        children = _children(value)
        changed = {
            key: new
            for key, old in children
            if not self._protects[key]
            and (new := self._convert(old, (*path, key))) is not old
        }
        return _with_changes(value, changed, path) if changed else value

    # The Trainer and Fabric call these four with different arguments, and the Trainer's
    # own need a LightningModule with a trainer: in Fabric they would fail.

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        """Run the hooks of the Trainer; Fabric has none."""
        return _base(module).pre_backward(self, tensor, module)

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass as the Trainer or as Fabric does."""
        _base(model).backward(self, tensor, model, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Any) -> Any:
        """Run the hooks of the Trainer; Fabric has none."""
        return _base(module).post_backward(self, tensor, module)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer as the Trainer or as Fabric does."""
        in_trainer = "model" in kwargs
        base = TrainerHalfPrecision if in_trainer else FabricHalfPrecision
        return base.optimizer_step(self, optimizer, *args, **kwargs)


@contextmanager
def full_precision() -> Iterator[None]:
    """Create and compute in float32 inside a half-precision step.

    Lightning's plugins for true half make the half dtype torch's default one during
    a step, so ``torch.hann_window(400)``, ``torch.tensor(0.97)`` and the quotient of
    two integer tensors come out in half. Within this context the default dtype is
    float32 and autocast is off on every device; both are restored on leaving, by an
    exception too. It converts nothing that exists already: a half tensor stays half.

    Works as a context manager and, called, as a decorator of a feature extractor. The
    default dtype is a setting of the whole process, as it is in Lightning's plugins.

    Yields:
        Nothing.

    Example:
        >>> plugin = HalfPrecisionForAudio("bf16-true")
        >>> with plugin.forward_context():
        ...     rounded = torch.hann_window(400)
        ...     with full_precision():
        ...         exact = torch.hann_window(400)
        >>> rounded.dtype, exact.dtype
        (torch.bfloat16, torch.float32)
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            for device_type in _AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        torch.set_default_dtype(previous)


def resolve_trainer_cfg(
    cfg: Mapping[str, Any], *, keep: Keep = "audio"
) -> dict[str, Any]:
    """Turn the ``trainer`` section of a NeMo configuration into ``Trainer`` arguments.

    A true-half ``precision`` becomes a :class:`HalfPrecisionForAudio`, which is added
    to the ``plugins`` of the configuration. Without a ``precision``, or with None,
    everything is passed on. ``cfg`` is not modified; interpolations are resolved, and
    a missing value (``???``) is OmegaConf's ``MissingMandatoryValue``.

    Args:
        cfg: An OmegaConf node or any mapping. OmegaConf nodes may also be nested in it.
        keep: As for :class:`HalfPrecisionForAudio`.

    Returns:
        Keyword arguments: ``Trainer(**resolve_trainer_cfg(cfg.trainer))``.

    Raises:
        TypeError: ``cfg`` is not a mapping.
        ValueError: ``precision`` is none of ``"16-true"``, ``"fp16-true"`` and
            ``"bf16-true"``; or ``plugins`` holds a precision plugin as well; or a
            value is a Hydra node (``_target_``), which would reach the Trainer as a
            plain dictionary: instantiate those first.

    Example:
        >>> arguments = resolve_trainer_cfg({"precision": "bf16-true", "max_steps": 9})
        >>> sorted(arguments), arguments["plugins"][0].precision
        (['max_steps', 'plugins'], 'bf16-true')
    """
    arguments = _plain(cfg)
    if not isinstance(arguments, dict):
        msg = f"cfg must be a mapping of Trainer arguments, got {type(cfg).__name__}"
        raise TypeError(msg)
    _refuse_hydra_nodes(arguments, "cfg")
    precision = arguments.get("precision")
    if precision is None:
        return arguments
    lightning_name = _lightning_name(
        precision, " For another precision of Lightning's call Trainer(**cfg)."
    )
    plugins = arguments.get("plugins")
    if plugins is None:
        plugins = []
    elif isinstance(plugins, str) or not isinstance(plugins, Iterable):
        plugins = [plugins]
    else:
        plugins = list(plugins)
    for plugin in plugins:
        if isinstance(plugin, Precision):
            msg = (
                f"cfg holds both precision={precision!r} and the precision plugin "
                f"{type(plugin).__name__}; choose one"
            )
            raise ValueError(msg)
    del arguments["precision"]
    arguments["plugins"] = [*plugins, HalfPrecisionForAudio(lightning_name, keep)]
    return arguments


def _lightning_name(precision: object, advice: str = "") -> str:
    """Return Lightning's name of a true-half precision.

    Raises:
        ValueError: It is none; the nearest one is suggested.
    """
    if isinstance(precision, str) and precision in _PRECISIONS:
        return _PRECISIONS[precision]
    text = str(precision).lower()
    nearest = difflib.get_close_matches(text, _PRECISIONS, n=1, cutoff=0.0)[0]
    allowed = ", ".join(repr(name) for name in _PRECISIONS)
    msg = (
        f"precision must be one of {allowed}, got {precision!r}. "
        f"Did you mean {nearest!r}?{advice}"
    )
    raise ValueError(msg)


def _checked_substrings(keep: object) -> tuple[str, ...]:
    """Return the substrings of ``keep``, case folded.

    Raises:
        TypeError: Something else than a string is among them.
        ValueError: One of them is empty.
    """
    substrings = (keep,) if isinstance(keep, str) else keep
    if isinstance(substrings, Iterable):
        substrings = tuple(substrings)
        if all(isinstance(substring, str) for substring in substrings):
            if "" in substrings:
                msg = "keep must not hold an empty string: every key contains it"
                raise ValueError(msg)
            return tuple(substring.casefold() for substring in substrings)
    msg = f"keep must be a string, several strings or a callable, got {keep!r}"
    raise TypeError(msg)


class _Protection(dict[Hashable, bool]):
    """Which keys are protected; answers are remembered, since keys come back."""

    def __init__(self, substrings: tuple[str, ...]) -> None:
        super().__init__()
        self.substrings = substrings

    def __missing__(self, key: Hashable) -> bool:
        parts = key if isinstance(key, tuple) else (key,)
        names = [part.casefold() for part in parts if isinstance(part, str)]
        answer = any(part in name for name in names for part in self.substrings)
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        self[key] = answer
        return answer


def _is_record(value: object) -> bool:
    """Return whether a dataclass instance; one that is a dict too is a dict here."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not isinstance(value, dict)
    )


def _is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _children(value: Any) -> Iterable[tuple[Hashable, object]]:
    """Return the keys and items of a container, and nothing for any other object."""
    if _is_record(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    if isinstance(value, Mapping):
        return value.items()
    if _is_named_tuple(value):
        return zip(value._fields, value, strict=True)
    if isinstance(value, Sequence) and not isinstance(value, _NOT_CONTAINERS):
        return enumerate(value)
    return ()


def _with_changes(container: Any, changed: dict[Any, Any], path: KeyPath) -> Any:
    """Return a container of the same type in which only the changed items differ.

    Raises:
        TypeError: Its class allows neither a changed copy nor a new one.
    """
    kind = type(container)
    try:
        if _is_record(container):
            return _changed_record(container, changed)
        if _is_named_tuple(container):
            return container._replace(**changed)
        copies = isinstance(container, dict | list) or (
            isinstance(container, MutableMapping | MutableSequence)
            and hasattr(kind, "__copy__")
        )
        if copies:  # keeps a default factory, a maximal length, further attributes
            twin = _copied(container)
            for key, item in changed.items():
                twin[key] = item
        elif isinstance(container, Mapping):
            twin = kind({**container, **changed})
        else:
            twin = kind([changed.get(i, item) for i, item in enumerate(container)])
        same_length = len(twin) == len(container)
        if same_length and all(twin[key] is item for key, item in changed.items()):
            return twin
        reason = None
    except Exception as error:  # a constructor of the user's may raise anything
        reason = error
    where = "".join(f"[{key!r}]" for key in path)
    msg = (
        f"cannot rebuild the {kind.__name__} at batch{where}: neither a copy nor its "
        "constructor takes the converted items. Turn it into a dict or a list in "
        "collate_fn, or keep it as it is"
    )
    raise TypeError(msg) from reason


def _copied(container: Any) -> Any:
    """Return a shallow copy that may be changed.

    Raises:
        TypeError: Its class takes itself for immutable.
    """
    twin = copy.copy(container)
    if twin is container:
        msg = f"copy.copy({type(container).__name__}) is the object itself"
        raise TypeError(msg)
    return twin


def _changed_record(record: object, changed: dict[str, object]) -> object:
    """Return a copy of a dataclass instance without calling its constructor."""
    twin = _copied(record)
    for name, item in changed.items():
        object.__setattr__(twin, name, item)  # a frozen dataclass as well
    for name in list(getattr(twin, "__dict__", ())):
        if isinstance(getattr(type(twin), name, None), cached_property):
            del twin.__dict__[name]  # computed from the fields before conversion
    return twin


def _base(module: object) -> Any:
    """Return whose hooks a module needs: Fabric takes LightningModules too."""
    in_trainer = isinstance(module, LightningModule) and module.fabric is None
    return TrainerHalfPrecision if in_trainer else FabricHalfPrecision


def _plain(value: Any) -> Any:
    """Return plain dictionaries and lists for mappings and OmegaConf nodes."""
    # Whoever passes a node has imported OmegaConf already; nobody else needs it.
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(
            value, resolve=True, throw_on_missing=True
        )
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_plain(item) for item in value)
    return value


def _refuse_hydra_nodes(value: object, where: str) -> None:
    """Check that nothing inside waits to be instantiated.

    Raises:
        ValueError: A mapping has the key ``_target_``.
    """
    if isinstance(value, dict):
        if "_target_" in value:
            msg = (
                f"{where} is a Hydra node (_target_: {value['_target_']!r}); pass the "
                "object itself, for example cfg = hydra.utils.instantiate(cfg)"
            )
            raise ValueError(msg)
        for key, item in value.items():
            _refuse_hydra_nodes(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_hydra_nodes(item, f"{where}[{i}]")
