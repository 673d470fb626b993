"""Tests of snippets/half_precision_for_audio.py, as read in its guide."""

import copy
import dataclasses
import itertools
import math
import pickle
import random
import sys
import types
import wave
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import HalfPrecision as FabricHalfPrecision
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

import snippets.half_precision_for_audio as snippet
from benchmarks.convert_input import ALLOWED_RATIO, batches, compare
from snippets.half_precision_for_audio import (
    HalfPrecisionForAudio,
    full_precision,
    resolve_trainer_cfg,
)

RECORDING = Path(__file__).parents[1] / "source" / "guide" / "arctic_a0009.wav"
PRECISIONS = {
    "16-true": torch.float16,
    "fp16-true": torch.float16,
    "bf16-true": torch.bfloat16,
}
ALL_DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str
)


def plugin(**arguments: Any) -> HalfPrecisionForAudio:  # noqa: ANN401
    """A BF16 plugin."""
    return HalfPrecisionForAudio("bf16-true", **arguments)


# Containers. Each kind holds the three items of a batch; the item named audio is under
# a key where the kind has keys.


@dataclasses.dataclass
class Record:
    """A dataclass."""

    audio: Any
    text: Any
    length: Any


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    """One that cannot be assigned to."""

    audio: Any
    text: Any
    length: Any


@dataclasses.dataclass(slots=True)
class SlottedRecord:
    """One without a __dict__."""

    audio: Any
    text: Any
    length: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlottedRecord:
    """Both."""

    audio: Any
    text: Any
    length: Any


class Named(NamedTuple):
    """A named tuple."""

    audio: Any
    text: Any
    length: Any


class NamedChild(Named):
    """As torch's PackedSequence: its constructor takes something else."""

    def __new__(cls, items: tuple[Any, Any, Any]) -> "NamedChild":
        """Take one tuple."""
        return super().__new__(cls, *items)


class Dict(dict[Any, Any]):
    """As transformers' BatchFeature: an attribute, and a constructor that needs it."""

    def __init__(self, rate: int, items: dict[Any, Any]) -> None:
        super().__init__(items)
        self.rate = rate


class UserMapping(UserDict[Any, Any]):
    """As transformers' BatchEncoding."""

    def __init__(self, rate: int, items: dict[Any, Any]) -> None:
        super().__init__(items)
        self.rate = rate


class ReadOnly(Mapping[Any, Any]):
    """A Mapping without setters: only its constructor makes another one."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: object) -> object:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Settable(ReadOnly, MutableMapping[Any, Any]):
    """A MutableMapping whose shallow copy shares its storage: the trap."""

    def __setitem__(self, key: object, item: object) -> None:
        self._items[key] = item

    def __delitem__(self, key: object) -> None:
        del self._items[key]


@dataclasses.dataclass
class RecordAndMapping(ReadOnly):
    """A dataclass that can be read as a mapping: its fields are what there is."""

    audio: Any
    text: Any
    length: Any

    def __getitem__(self, key: object) -> object:
        return getattr(self, str(key))

    def __iter__(self) -> Iterator[Any]:
        return iter(("audio", "text", "length"))

    def __len__(self) -> int:
        return 3


@dataclasses.dataclass
class DictAndRecord(OrderedDict[str, Any]):
    """As transformers' ModelOutput: a dict whose items are attributes too."""

    audio: Any
    text: Any
    length: Any

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key: str, item: object) -> None:
        super().__setitem__(key, item)
        object.__setattr__(self, key, item)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.values())


class List(list[Any]):
    """A list with an attribute."""

    rate = 0


def _defaultdict(items: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(int, items)


def _list(items: dict[Any, Any]) -> List:
    made = List(items.values())
    made.rate = 16_000
    return made


KEYED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": _defaultdict,
    "UserDict": UserDict,
    "ChainMap": ChainMap,
    "mappingproxy": types.MappingProxyType,
    "dict subclass": lambda items: Dict(16_000, items),
    "UserDict subclass": lambda items: UserMapping(16_000, items),
    "Mapping": ReadOnly,
    "MutableMapping": Settable,
    "dataclass": lambda items: Record(**items),
    "frozen": lambda items: FrozenRecord(**items),
    "slots": lambda items: SlottedRecord(**items),
    "frozen slots": lambda items: FrozenSlottedRecord(**items),
    "dataclass Mapping": lambda items: RecordAndMapping(**items),
    "dict dataclass": lambda items: DictAndRecord(**items),
    "named tuple": lambda items: Named(**items),
    "named tuple child": lambda items: NamedChild(tuple(items.values())),
}
UNKEYED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda items: list(items.values()),
    "tuple": lambda items: tuple(items.values()),
    "list subclass": _list,
    "deque": lambda items: deque(items.values(), maxlen=7),
    "UserList": lambda items: UserList(items.values()),
}
CONTAINERS = KEYED | UNKEYED


def items_of(container: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401
    """Keys and items, written independently of the snippet; empty for a leaf."""
    if isinstance(container, Tensor | str):
        return []
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return [
            (f.name, getattr(container, f.name)) for f in dataclasses.fields(container)
        ]
    if isinstance(container, Mapping):
        return list(container.items())
    if isinstance(container, tuple) and hasattr(container, "_asdict"):
        return list(container._asdict().items())
    if isinstance(container, Sequence):
        return list(enumerate(container))
    return []


def is_container(value: object) -> bool:
    """Whether its items are part of the structure, even if there are none."""
    known = (Mapping, list, tuple, deque, UserList)
    return dataclasses.is_dataclass(value) or isinstance(value, known)


def leaves(
    value: object, path: tuple[Any, ...] = ()
) -> list[tuple[tuple[Any, ...], Any]]:
    """Every path of a structure with what lies there, and every container's type."""
    children = items_of(value)
    here = [(path, type(value) if is_container(value) else value)]
    deeper = [leaves(item, (*path, key)) for key, item in children]
    return [*here, *itertools.chain.from_iterable(deeper)]


def is_protected(path: tuple[Any, ...]) -> bool:
    """Whether a string on the path contains audio."""
    return any(isinstance(key, str) and "audio" in key.lower() for key in path)


def assert_converted(before: object, after: object) -> None:
    """Types and places as before; floats cast unless they are protected."""
    for (path, old), (new_path, new) in zip(leaves(before), leaves(after), strict=True):
        assert path == new_path
        if (
            isinstance(old, Tensor)
            and old.is_floating_point()
            and not is_protected(path)
        ):
            assert torch.equal(new, old.to(torch.bfloat16)), path
            assert new.dtype == torch.bfloat16
        else:
            assert new is old, path


def sample_items() -> dict[str, Any]:
    """The items of a batch: one to keep, one to cast, one to leave."""
    return {
        "audio": torch.rand(4),
        "text": torch.rand(3),
        "length": torch.tensor([4]),
    }


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_keeps_its_type_and_its_protected_item(kind: str) -> None:
    """Cast what is not protected, in any container, and leave the input as it was."""
    batch = CONTAINERS[kind](sample_items())
    before = leaves(batch)

    converted = plugin().convert_input(batch)

    assert_converted(batch, converted)
    assert all(a is b for (_, a), (_, b) in zip(before, leaves(batch), strict=True))


@pytest.mark.parametrize("inner", CONTAINERS)
@pytest.mark.parametrize("outer", CONTAINERS)
def test_every_container_is_searched_in_every_other(outer: str, inner: str) -> None:
    """All pairs: under audio all is kept, elsewhere the inner keys decide."""
    batch = CONTAINERS[outer]({
        "audio": CONTAINERS[inner](sample_items()),
        "text": CONTAINERS[inner](sample_items()),
        "length": "unconverted",
    })
    before = leaves(batch)

    converted = plugin().convert_input(batch)

    assert_converted(batch, converted)
    assert all(a is b for (_, a), (_, b) in zip(before, leaves(batch), strict=True))


def random_batch(source: random.Random, depth: int = 4) -> object:
    """A random structure of all container kinds, keys and dtypes."""
    if depth == 0 or source.random() < 0.25:
        dtype = source.choice([
            torch.float32, torch.float64, torch.float16, torch.bfloat16,
            torch.int64, torch.bool, torch.complex64,
        ])  # fmt: skip
        leaf = torch.ones(2).to(dtype)
        return source.choice([leaf, leaf, leaf, "text", 7, None, b"raw", 0.5])
    if source.random() < 0.5:
        kind = source.choice(list(CONTAINERS.values()))
        names = ["audio", "text", "length"]
        return kind({name: random_batch(source, depth - 1) for name in names})
    keys = ["audio", "Source_AUDIO", "text", 0, 7, None, b"audio", ("a", 1), 2.5, True]
    chosen = source.sample(keys, source.randrange(4))
    return {key: random_batch(source, depth - 1) for key in chosen}


@pytest.mark.parametrize("seed", range(300))
def test_random_structures_follow_the_rules(seed: int) -> None:
    """Any nesting of any kinds, with any keys."""
    batch = random_batch(random.Random(seed))
    before = leaves(batch)

    converted = plugin().convert_input(batch)

    assert_converted(batch, converted)
    assert all(a is b for (_, a), (_, b) in zip(before, leaves(batch), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_dtype_is_cast_or_left(precision: str) -> None:
    """Floating-point types become half; the others, and kept ones, stay the object."""
    half = HalfPrecisionForAudio(precision)
    tried = 0
    for dtype in ALL_DTYPES:
        if dtype == torch.complex32:
            continue  # warns that it is experimental
        try:
            x = torch.zeros(2).to(dtype)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # no kernels on this device
        tried += 1
        converted = half.convert_input({"x": x, "audio": x})

        assert converted["audio"] is x
        if dtype.is_floating_point:
            assert converted["x"].dtype == PRECISIONS[precision], dtype
        else:
            assert converted["x"] is x, dtype
    assert tried > 10


@pytest.mark.parametrize(
    ("keep", "key", "kept"),
    [
        ("audio", "audio", True),
        ("audio", "my_audio_signal", True),
        ("audio", "AUDIO", True),
        ("Audio", "audio", True),
        ("audio", "input_signal", False),
        (("audio", "signal"), "input_signal", True),
        (["signal"], "audio", False),
        (iter(["signal"]), "input_signal", True),
        ((), "audio", False),
        ("audio", 7, False),
        ("audio", None, False),
        ("audio", b"audio", False),
        ("audio", ("left", "audio"), True),
        ("audio", ("left", 0), False),
    ],
)
def test_substrings_match_as_documented(keep: Any, key: object, kept: bool) -> None:  # noqa: ANN401
    """Case does not count; only strings, and strings in a tuple, can match."""
    x = torch.ones(2)

    converted = plugin(keep=keep).convert_input({key: x})

    assert (converted[key] is x) == kept


def test_a_predicate_gets_every_path_to_a_float() -> None:
    """Keys, field names and positions, from the outside in; other leaves not at all."""
    x = torch.ones(2)
    asked: list[tuple[Any, ...]] = []

    def remember(path: tuple[Any, ...], tensor: Tensor) -> bool:
        assert tensor is x
        asked.append(path)
        return bool(path[-1] == 1)

    batch = {
        "cuts": [Record(x, x.int(), (x, x))],
        3: Named(x, "text", {"audio": x}),
        "deque": deque([x, x]),
    }

    converted = plugin(keep=remember).convert_input(batch)

    assert asked == [
        ("cuts", 0, "audio"),
        ("cuts", 0, "length", 0),
        ("cuts", 0, "length", 1),
        (3, "audio"),
        (3, "length", "audio"),
        ("deque", 0),
        ("deque", 1),
    ]
    assert converted["cuts"][0].length[1] is x
    assert converted["deque"][1] is x
    assert converted[3].audio.dtype == torch.bfloat16


def test_a_bare_tensor_has_an_empty_path() -> None:
    """Without a predicate it is cast; with one it can be kept."""
    x = torch.ones(2)

    assert plugin().convert_input(x).dtype == torch.bfloat16
    assert plugin(keep=lambda path, _: path == ()).convert_input(x) is x


def test_what_lies_under_a_protected_key_is_not_even_opened() -> None:
    """The same container comes back, whatever it is."""
    held = [torch.ones(2), {"text": torch.ones(2)}]
    converted = plugin().convert_input({"audio": held})

    assert converted["audio"] is held


def test_containers_keep_what_they_carry_besides_items() -> None:
    """Attributes, a default factory, a maximal length, values of other fields."""
    items = sample_items()
    convert = plugin().convert_input

    assert convert(Dict(16_000, items)).rate == 16_000
    assert convert(UserMapping(16_000, items)).rate == 16_000
    assert convert(_list(items)).rate == 16_000
    assert convert(_defaultdict(items)).default_factory is int
    assert convert(deque(items.values(), maxlen=7)).maxlen == 7


def test_a_dataclass_is_copied_without_its_constructor() -> None:
    """Fields outside the constructor convert too, and no stale property survives."""
    calls = []

    @dataclasses.dataclass
    class Features:
        text: Tensor
        derived: Tensor = dataclasses.field(init=False)
        unset: Tensor = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            calls.append(self)
            self.derived = self.text * 2

        @cached_property
        def dtype(self) -> torch.dtype:
            return self.text.dtype

    features = Features(torch.ones(2))
    assert features.dtype == torch.float32

    converted = plugin().convert_input([features])[0]

    assert len(calls) == 1
    assert converted.derived.dtype == converted.dtype == torch.bfloat16
    assert not hasattr(converted, "unset")
    assert features.text.dtype == features.derived.dtype == torch.float32


def test_a_dict_that_is_a_dataclass_too_stays_consistent() -> None:
    """Its items and its attributes are the same objects, before and after."""
    output = DictAndRecord(**sample_items())

    converted = plugin().convert_input([output])[0]

    assert converted["text"] is converted.text
    assert converted["text"].dtype == torch.bfloat16
    assert converted["audio"] is converted.audio is output.audio
    assert output["text"] is output.text
    assert output.text.dtype == torch.float32


def test_a_packed_sequence_stays_one() -> None:
    """It is a named tuple whose constructor takes other arguments than its fields."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])

    converted = plugin().convert_input({"text": packed})["text"]

    assert type(converted) is type(packed)
    assert converted.data.dtype == torch.bfloat16
    assert converted.batch_sizes is packed.batch_sizes


def test_other_layouts_and_subclasses_of_tensor_are_cast() -> None:
    """Sparse and jagged tensors and parameters are tensors as well."""
    sparse = torch.eye(3).to_sparse()
    jagged = torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    )
    parameter = nn.Parameter(torch.ones(2))

    converted = plugin().convert_input([sparse, jagged, parameter])

    assert [x.dtype for x in converted] == [torch.bfloat16] * 3
    assert converted[0].is_sparse
    assert converted[1].is_nested


def test_a_tensor_in_two_places_is_decided_in_each() -> None:
    """Kept under one key, cast under the other."""
    x = torch.ones(2)

    converted = plugin().convert_input({"audio": x, "text": x})

    assert converted["audio"] is x
    assert converted["text"].dtype == torch.bfloat16


def test_other_objects_pass_unopened() -> None:
    """Sets, iterators, ranges, bytes and objects without known structure."""
    values = [{1, 2}, iter([1]), range(9), b"raw", bytearray(2), object(), nn.ReLU()]

    converted = plugin().convert_input({"values": values})

    assert all(a is b for a, b in zip(values, converted["values"], strict=True))


def test_the_memory_for_keys_is_bounded() -> None:
    """Batches keyed by utterance bring new keys for ever."""
    half = plugin()
    for i in range(5000):
        half.convert_input({f"utterance {i}": 1, "audio": 1})

    assert len(half._protects) <= snippet._MAX_REMEMBERED
    x = torch.ones(2)
    assert half.convert_input({"audio": x})["audio"] is x


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_a_copied_plugin_converts_alike(duplicate: Callable[[Any], Any]) -> None:
    """Strategies that start processes send the plugin to them."""
    half = plugin(keep=("signal",))
    half.convert_input({"signal": 1, "text": 1})
    x = torch.ones(2)

    converted = duplicate(half).convert_input({"signal": x, "audio": x})

    assert converted["signal"] is x
    assert converted["audio"].dtype == torch.bfloat16


# Oracles.


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_with_nothing_to_keep_it_is_lightnings_plugin(precision: Any) -> None:  # noqa: ANN401
    """Bit for bit Lightning's own result, on whatever Lightning can convert."""
    ours, theirs = HalfPrecisionForAudio(precision, keep=()), HalfPrecision(precision)
    compared = 0
    for seed in range(200):
        batch = random_batch(random.Random(seed))
        try:
            expected = theirs.convert_input(batch)
        except (TypeError, ValueError):
            continue  # a frozen dataclass, or a constructor it cannot call
        compared += 1
        converted = ours.convert_input(batch)
        for (path, a), (_, b) in zip(leaves(converted), leaves(expected), strict=True):
            if isinstance(a, Tensor):
                assert a.dtype == b.dtype, path
                assert torch.equal(a, b)
            else:
                assert a == b, path
    assert compared > 50


def nemo_rules(batch: Any) -> Any:  # noqa: ANN401
    """NeMo 3.0.0's rules; its own class gave the same on the guide's 24 batches."""
    if not isinstance(batch, dict):
        return HalfPrecision("bf16-true").convert_input(batch)
    return {
        key: item
        if "audio" in key and isinstance(item, Tensor)
        else nemo_rules(item)
        if isinstance(item, dict | Tensor)
        else item
        for key, item in batch.items()
    }


def string_dicts(source: random.Random, depth: int = 3) -> dict[str, Any]:
    """Nested dicts with strings as keys, which NeMo's class handles in full."""
    keys = source.sample(["audio", "an_audio", "Audio", "signal", "text", "in"], 3)
    return {
        key: string_dicts(source, depth - 1)
        if depth and source.random() < 0.5
        else torch.ones(2)
        for key in keys
    }


@pytest.mark.parametrize("seed", range(100))
def test_what_nemo_keeps_is_kept(seed: int) -> None:
    """On nested dicts ours keeps everything that NeMo's keeps, and more."""
    batch = string_dicts(random.Random(seed))
    ours, theirs = plugin().convert_input(batch), nemo_rules(batch)
    for (path, a), (_, b) in zip(leaves(ours), leaves(theirs), strict=True):
        if isinstance(a, Tensor) and b.dtype == torch.float32:
            assert a is b, path


# Windows and mel filters.


def test_full_precision_restores_the_default_dtype() -> None:
    """After nesting, after an exception, and every time the decorator is used."""
    half = plugin()

    @full_precision()
    def window() -> Tensor:
        return torch.hann_window(400)

    def fail() -> None:
        with full_precision():
            raise ZeroDivisionError

    with half.forward_context():
        for _ in range(2):
            assert torch.equal(window(), torch.hann_window(400, dtype=torch.float32))
            assert torch.get_default_dtype() == torch.bfloat16
        with full_precision(), half.forward_context(), full_precision():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
        with pytest.raises(ZeroDivisionError):
            fail()
        assert torch.get_default_dtype() == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_full_precision_switches_autocast_off() -> None:
    """And back on afterwards."""
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_window_in_a_step_is_rounded_and_a_buffer_too() -> None:
    """The trap, its way out, and what the way out cannot reach."""
    half = plugin()
    module = nn.Module()
    module.register_buffer("window", torch.hann_window(400))
    with half.forward_context():
        assert torch.hann_window(400).dtype == torch.bfloat16
        half.convert_module(module)
        with full_precision():
            assert torch.hann_window(400).dtype == torch.float32
            assert module.window.dtype == torch.bfloat16


# Numbers of the guide.


def recording() -> Tensor:
    """The recorded speech, 16-bit samples."""
    with wave.open(str(RECORDING)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        assert file.getframerate() == 16_000
        samples = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(samples, dtype=torch.int16)


def snr(x: Tensor) -> float:
    """The signal-to-noise ratio of x in BF16, in dB."""
    x = x.double()
    noise = x.bfloat16().double() - x
    return 10 * math.log10(x.square().mean() / noise.square().mean())


def test_the_recording_may_be_shipped() -> None:
    """Small, and with its terms beside it."""
    terms = RECORDING.with_name("arctic_a0009.LICENSE.txt").read_text()

    assert RECORDING.stat().st_size < 400_000
    assert "free for use for any purpose (commercial or otherwise)" in terms
    assert "Carnegie Mellon University" in terms


def test_no_sample_moves_by_more_than_its_256th() -> None:
    """All 65,536 samples of 16 bits."""
    samples = torch.arange(-(2**15), 2**15).double()

    error = (samples.bfloat16().double() - samples).abs()

    assert (error <= 2**-8 * samples.abs()).all()


def test_small_samples_are_exact() -> None:
    """Integers up to 256 in magnitude, and 257 is the first that is not."""
    exact = torch.arange(-256, 257)

    assert torch.equal(exact.bfloat16().long(), exact)
    assert torch.tensor(257.0).bfloat16().item() == 256


def test_the_snr_of_any_waveform_is_bounded() -> None:
    """Speech at several gains, noise, a sine and the worst constant: above 48.2 dB."""
    speech = recording().double() / 2**15
    worst = torch.full((9,), 1 + 2**-8 - 2**-20).double()
    sine = torch.arange(16_000).double().mul(0.1).sin()
    noise = torch.randn(16_000, generator=torch.manual_seed(0)).double()
    bound = 20 * math.log10(2**8)

    for signal in (*(speech * g for g in (0.01, 0.3, 1.0, 7.0)), sine, noise, worst):
        assert snr(signal) > bound
    assert snr(worst) < bound + 0.1


def test_even_significands_give_56_6_decibels() -> None:
    """Within a hundredth, over a fine and even grid of significands."""
    significands = 1 + torch.arange(2**20).double() / 2**20

    assert math.isclose(snr(significands), 10 * math.log10(28 * 2**14), abs_tol=0.01)


# Training.

quiet: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def log_spectrum(audio: Tensor) -> Tensor:
    """A log power spectrum of 257 bins, (batch, bins, frames)."""
    window = torch.hann_window(400)
    spectrum = torch.stft(audio, 512, 160, 400, window, return_complex=True)
    return torch.log(spectrum.abs().square() + 2**-24)


class LoudFrames(lightning.LightningModule):
    """Learns which frames are louder than their utterance's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(257, 1, 1)
        self.seen: dict[str, Any] = {}
        self.hooks: list[str] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """One logit a frame; remembers what it saw."""
        self.seen = {name: item.dtype for name, item in batch.items()}
        with full_precision():
            features = log_spectrum(batch["audio"].float())
        self.features = features
        centered = features - features.mean(dim=-1, keepdim=True)
        logits: Tensor = self.layer(centered.to(self.layer.weight.dtype)).squeeze(1)
        return logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """In float32."""
        logits = self(batch).float()
        return nn.functional.binary_cross_entropy_with_logits(
            logits, batch["loud"].float()
        )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The loss."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note the call."""
        self.hooks.append("before backward")

    def on_after_backward(self) -> None:
        """Note the call."""
        self.hooks.append("after backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the call."""
        self.hooks.append("before step")


def speech_batch() -> dict[str, Tensor]:
    """Six half seconds of the recording, and which of their frames are loud."""
    crops = (recording().float() / 2**15)[: 6 * 8000].view(6, 8000)
    power = log_spectrum(crops).exp().sum(dim=1)
    loud = (power > power.mean(dim=1, keepdim=True)).float()
    return {"audio": crops, "loud": loud}


def right(model: LoudFrames, batch: dict[str, Tensor]) -> float:
    """The share of frames that the trained model gets right."""
    guess = model(batch) > 0
    share: Tensor = (guess == batch["loud"].bool()).float().mean()
    return share.item()


def half_way(batch: dict[str, Tensor]) -> float:
    """Half way from always answering quiet to always being right."""
    return 1 - batch["loud"].mean().item() / 2


# Lightning suggests more workers and calls torch's own renamed pytree class.
quiet_lightning = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def of_lightning(test: Callable[..., None]) -> Callable[..., None]:
    """Ignore Lightning's own warnings in a test."""
    for mark in quiet_lightning:
        test = mark(test)
    return test


@of_lightning
@pytest.mark.parametrize("kept", [True, False])
def test_the_trainer_learns_from_the_waveform_as_recorded(kept: bool) -> None:
    """With Lightning's plugin the model learns too, from features that are rounded."""
    torch.manual_seed(0)
    batch = speech_batch()
    model = LoudFrames()
    half = plugin() if kept else HalfPrecision("bf16-true")
    trainer = lightning.Trainer(
        plugins=half, max_epochs=40, gradient_clip_val=1.0, **quiet
    )

    loader = DataLoader[dict[str, Tensor]]([batch], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader)

    assert trainer.precision == "bf16-true"
    assert model.layer.weight.dtype == torch.bfloat16
    assert model.seen["audio"] == (torch.float32 if kept else torch.bfloat16)
    assert model.seen["loud"] == torch.bfloat16
    assert model.hooks[:3] == ["before backward", "after backward", "before step"]
    assert torch.equal(model.features, log_spectrum(batch["audio"])) == kept
    assert right(model, batch) > half_way(batch)


@pytest.mark.parametrize("kept", [True, False])
def test_fabric_learns_from_the_waveform_as_recorded(kept: bool) -> None:
    """A LightningModule in Fabric: Fabric's way, not the Trainer's, and no hooks."""
    torch.manual_seed(0)
    batch = speech_batch()
    half = plugin() if kept else FabricHalfPrecision("bf16-true")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=half)
    module = LoudFrames()
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["loud"])
        fabric.backward(loss, model=model)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()

    assert logits.dtype == torch.float32
    assert module.layer.weight.dtype == torch.bfloat16
    assert module.seen["audio"] == (torch.float32 if kept else torch.bfloat16)
    assert not module.hooks
    assert torch.equal(module.features, log_spectrum(batch["audio"])) == kept
    assert right(module, batch) > half_way(batch)


def test_fabric_takes_a_closure_and_keywords() -> None:
    """A keyword of forward counts as a key, a position does not."""
    seen: dict[str, torch.dtype] = {}

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor, audio: Tensor) -> Tensor:
            seen.update(x=x.dtype, audio=audio.dtype)
            output: Tensor = self.layer(x)
            return output

    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin())
    module = Keywords()
    model, optimizer = fabric.setup(module, torch.optim.LBFGS(module.parameters()))
    x = torch.ones(1, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x, audio=x).square().sum()
        fabric.backward(loss)
        return loss

    before = closure().item()
    optimizer.step(closure)

    assert seen == {"x": torch.bfloat16, "audio": torch.float32}
    assert closure().item() < before


def test_the_trainers_own_plugin_fails_in_fabric() -> None:
    """Why four hooks are overridden: Fabric takes it and cannot run it."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=HalfPrecision("bf16-true"))
    model = fabric.setup(nn.Linear(2, 1))

    with pytest.raises(AttributeError, match="trainer"):
        fabric.backward(model(torch.ones(1, 2)).sum())


@pytest.mark.parametrize("base", [HalfPrecision, FabricHalfPrecision])
def test_it_is_a_half_precision_of_both(base: type[Any]) -> None:
    """So that either framework's checks for its own class hold."""
    assert isinstance(plugin(), base)


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS.items())
def test_precisions_have_lightnings_names(precision: str, dtype: torch.dtype) -> None:
    """NeMo's name for FP16 becomes Lightning's, in the attribute and in the cast."""
    half = HalfPrecisionForAudio(precision)

    assert half.precision == precision.removeprefix("fp")
    assert half.convert_module(nn.Linear(1, 1)).weight.dtype == dtype
    assert half.convert_input(torch.ones(1)).dtype == dtype


# Configuration.


@pytest.mark.parametrize("make", [dict, OmegaConf.create, types.MappingProxyType])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_configuration_becomes_trainer_arguments(
    make: Callable[[Any], Any], precision: str
) -> None:
    """The three names, from a node or a mapping, which stays as it was."""
    cfg = make({"precision": precision, "max_steps": 3, "accelerator": "cpu"})

    arguments = resolve_trainer_cfg(cfg, keep="signal")

    assert type(arguments) is dict
    assert list(arguments) == ["max_steps", "accelerator", "plugins"]
    (half,) = arguments["plugins"]
    assert half.precision == precision.removeprefix("fp")
    x = torch.ones(2)
    assert half.convert_input({"signal": x})["signal"] is x
    assert dict(cfg) == {"precision": precision, "max_steps": 3, "accelerator": "cpu"}
    trainer = lightning.Trainer(**quiet | arguments)
    assert trainer.precision_plugin is half


def test_interpolations_and_nested_nodes_are_resolved() -> None:
    """Also in a plain dictionary that holds nodes, as dict(cfg.trainer) does."""
    cfg = OmegaConf.create({
        "half": "bf16-true",
        "trainer": {"precision": "${half}", "profiler": {"name": "${half}"}},
    })

    for section in (cfg.trainer, dict(cfg.trainer), dict(cfg)["trainer"]):
        arguments = resolve_trainer_cfg(section)
        assert arguments["profiler"] == {"name": "bf16-true"}
        assert type(arguments["profiler"]) is dict
        assert arguments["plugins"][0].precision == "bf16-true"


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        AsyncCheckpointIO(),
        [AsyncCheckpointIO()],
        (AsyncCheckpointIO(), "name"),
        "name",
    ],
    ids=["none", "empty", "one", "list", "tuple", "string"],
)
def test_the_users_plugins_stay(given: Any) -> None:  # noqa: ANN401
    """In their order, before ours; the user's own list is not touched."""
    cfg = {"precision": "bf16-true", "plugins": given}
    before = copy.copy(given)
    expected = (
        []
        if given is None
        else list(given)
        if isinstance(given, list | tuple)
        else [given]
    )

    *plugins, half = resolve_trainer_cfg(cfg)["plugins"]

    assert all(a is b for a, b in zip(plugins, expected, strict=True))
    assert isinstance(half, HalfPrecisionForAudio)
    if isinstance(given, list | tuple):
        assert len(given) == len(before)


def test_plugins_in_a_node_stay() -> None:
    """A node with allow_objects holds the object itself, in a list or alone."""
    checkpoints = TorchCheckpointIO()
    for plugins in ([checkpoints], checkpoints):
        cfg = OmegaConf.create(
            {"precision": "16-true", "plugins": plugins}, flags={"allow_objects": True}
        )
        first, _ = resolve_trainer_cfg(cfg)["plugins"]
        assert first is checkpoints


@pytest.mark.parametrize("cfg", [{}, {"precision": None}, {"max_steps": 1}])
def test_without_a_precision_everything_passes(cfg: dict[str, Any]) -> None:
    """A new dictionary with the same content."""
    cfg = {**cfg, "plugins": [plugin()]}

    arguments = resolve_trainer_cfg(cfg)

    assert arguments == cfg
    assert arguments is not cfg


def test_it_works_where_omegaconf_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is looked up, never imported."""
    monkeypatch.delitem(sys.modules, "omegaconf")

    assert resolve_trainer_cfg({"precision": "bf16-true"})["plugins"]
    assert "omegaconf" not in sys.modules


# Errors.


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("bf16", "bf16-true"),
        ("fp16", "fp16-true"),
        ("16", "16-true"),
        (16, "16-true"),
        ("BF16-true", "bf16-true"),
        ("bf16_true", "bf16-true"),
        ("bf16-mixed", "bf16-true"),
        ("16-mixed", "16-true"),
        ("bfloat16", "bf16-true"),
        (torch.bfloat16, "bf16-true"),
        ("float16", "fp16-true"),
        ("32-true", "16-true"),
        ("bf16-flash", "bf16-true"),
    ],
)
def test_another_precision_is_refused_with_a_suggestion(
    wrong: Any,  # noqa: ANN401
    meant: str,
) -> None:
    """In the plugin and in the configuration, which also says what else to do."""
    message = f"got {wrong!r}. Did you mean '{meant}'?"
    with pytest.raises(ValueError, match="precision must be one of") as error:
        HalfPrecisionForAudio(wrong)
    assert str(error.value).endswith(message)
    with pytest.raises(ValueError, match=r"call Trainer\(\*\*cfg\)\.$") as error:
        resolve_trainer_cfg({"precision": wrong})
    assert message in str(error.value)


@pytest.mark.parametrize("wrong", [None, [], ["bf16-true"], {}, "", True, 1.5])
def test_a_precision_of_any_type_is_refused(wrong: Any) -> None:  # noqa: ANN401
    """With a ValueError, not with whatever its type would cause."""
    with pytest.raises(ValueError, match="Did you mean"):
        HalfPrecisionForAudio(wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("", ValueError, "every key contains it"),
        (["audio", ""], ValueError, "every key contains it"),
        (None, TypeError, "several strings or a callable, got None"),
        (7, TypeError, "several strings or a callable, got 7"),
        (b"audio", TypeError, "several strings or a callable, got b'audio'"),
        (["audio", 7], TypeError, "several strings or a callable, got"),
    ],
)
def test_a_keep_that_cannot_be_meant_is_refused(
    wrong: Any,  # noqa: ANN401
    error: type[Exception],
    message: str,
) -> None:
    """Also through the configuration."""
    with pytest.raises(error, match=message):
        plugin(keep=wrong)
    with pytest.raises(error, match=message):
        resolve_trainer_cfg({"precision": "bf16-true"}, keep=wrong)


def test_a_batch_that_contains_itself_is_refused() -> None:
    """Through a list and through a dictionary."""
    endless: list[Any] = []
    endless.append({"text": endless})

    with pytest.raises(ValueError, match="does it contain itself"):
        plugin().convert_input(endless)


class Fixed(tuple[Any, ...]):
    """A tuple whose constructor takes its items one by one."""

    def __new__(cls, first: object, second: object) -> "Fixed":
        """Take two items."""
        return super().__new__(cls, (first, second))


class Stubborn(dict[str, Any]):
    """A dict that cannot be changed."""

    def __setitem__(self, key: str, item: object) -> None:
        raise PermissionError(key)


class Constant(UserDict[str, Any]):
    """A mapping that is its own copy, as immutable ones are."""

    def __copy__(self) -> "Constant":
        return self


class Deaf(ReadOnly):
    """A mapping whose constructor drops what it gets."""

    def __init__(self, items: Mapping[Any, Any], *, listen: bool = False) -> None:
        super().__init__(items if listen else {})


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Fixed(x, x),
        lambda x: Stubborn(text=x),
        lambda x: Constant(text=x),
        lambda x: Deaf({"text": x}, listen=True),
    ],
    ids=["constructor", "setter", "own copy", "deaf"],
)
def test_a_container_that_cannot_be_rebuilt_is_named(
    make: Callable[[Any], Any],
) -> None:
    """With its place; without anything to cast it passes."""
    bad, good = make(torch.ones(2)), make(torch.ones(2).int())
    before = leaves(bad)

    with pytest.raises(TypeError, match=r"rebuild the \w+ at batch\['cuts'\]\[1\]:"):
        plugin().convert_input({"cuts": [1, bad]})
    assert all(a is b for (_, a), (_, b) in zip(before, leaves(bad), strict=True))
    assert plugin().convert_input({"cuts": [1, good]})["cuts"][1] is good


@pytest.mark.parametrize("half", [HalfPrecision("bf16-true"), plugin()])
def test_two_precisions_are_refused(half: HalfPrecision) -> None:
    """As Lightning refuses them, but before it has dropped one."""
    with pytest.raises(ValueError, match="both precision='16-true' and the precision"):
        resolve_trainer_cfg({"precision": "16-true", "plugins": [half]})
    with pytest.raises(ValueError, match="both precision"):
        resolve_trainer_cfg({"precision": "16-true", "plugins": half})


@pytest.mark.parametrize(
    ("cfg", "where"),
    [
        ({"_target_": "a.B"}, "cfg is a Hydra node"),
        ({"strategy": {"_target_": "a.B"}}, "cfg.strategy is"),
        ({"callbacks": [1, {"_target_": "a.B"}]}, r"cfg.callbacks\[1\] is"),
        ({"callbacks": ({"x": {"_target_": "a.B"}},)}, r"cfg.callbacks\[0\].x is"),
    ],
)
@pytest.mark.parametrize("precision", [None, "bf16-true"])
def test_a_node_for_hydra_is_named(
    cfg: dict[str, Any], where: str, precision: str | None
) -> None:
    """Wherever it is, with and without a precision, in a node or a dictionary."""
    with pytest.raises(ValueError, match=where):
        resolve_trainer_cfg({**cfg, "precision": precision})
    with pytest.raises(ValueError, match=where):
        resolve_trainer_cfg(OmegaConf.create({**cfg, "precision": precision}))


@pytest.mark.parametrize("wrong", [None, "bf16-true", ["bf16-true"], 7])
def test_a_configuration_must_be_a_mapping(wrong: Any) -> None:  # noqa: ANN401
    """Also when it is a node."""
    with pytest.raises(TypeError, match="cfg must be a mapping of Trainer arguments"):
        resolve_trainer_cfg(wrong)
    with pytest.raises(TypeError, match="cfg must be a mapping of Trainer arguments"):
        resolve_trainer_cfg(OmegaConf.create([1]))  # type: ignore[arg-type]


def test_a_missing_value_is_omegaconfs_error() -> None:
    """With its name."""
    cfg = OmegaConf.create({"precision": "bf16-true", "devices": "???"})

    with pytest.raises(MissingMandatoryValue, match="devices"):
        resolve_trainer_cfg(cfg)


# Cost.


@pytest.mark.parametrize("name", batches())
def test_conversion_costs_at_most_a_tenth_more_than_lightnings(name: str) -> None:
    """The median of interleaved ratios, the best of three tries on a shared machine."""
    ours = plugin().convert_input
    theirs = HalfPrecision("bf16-true").convert_input
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tries = (compare(ours, theirs, batches()[name], 30)[2] for _ in range(3))
        assert any(ratio <= ALLOWED_RATIO for ratio in tries)
    finally:
        torch.set_num_threads(torch_threads)
