"""Look up a precision name, and find the name for the same precision elsewhere.

Copy this file into your project; it needs only Python.

The same string names different things in different frameworks, and the same thing has
different names. Two names are equivalent when all six fields of `Precision` agree.

    Guide:   guide/precision_names
    Tests:   tests/test_precision_names.py
    Sources: each framework's own code, at the version that `FRAMEWORKS` gives;
             Micikevicius et al. 2018, arXiv:1710.03740, section 3 (main params, loss
             scaling); Micikevicius et al. 2022, arXiv:2209.05433, section 3 (FP8).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches

__all__ = ["FRAMEWORKS", "NAMES", "SCALERS", "Framework", "InexactTranslation", "Name"]
__all__ += ["NoEquivalent", "Precision", "explain", "lookup", "main", "translate"]


@dataclass(frozen=True)
class Precision:
    """What happens to each kind of number; dtypes are called as torch calls them.

    ``"yours"`` stands for what the name leaves to the code around it.
    """

    storage: str  # of the weights that the forward pass reads
    compute: str  # of the operands of a matrix product
    reduce: str  # of the gradients, while they are summed over the ranks
    main_params: str  # of a wider copy of the weights, which the optimizer steps
    optimizer_state: str  # of AdamW's two moments
    scaler: str  # of the loss: a key of SCALERS

    def differences(self, other: "Precision") -> dict[str, tuple[str, str]]:
        """The fields that differ, each with its value here and in ``other``."""
        there = asdict(other)
        return {k: (v, there[k]) for k, v in asdict(self).items() if v != there[k]}


@dataclass(frozen=True)
class Framework:
    """Where its names are written, and what they were checked against."""

    setting: str  # what you write, with {} in the place of the name
    checked: str  # "ran" or "read", and at which version
    special: bool  # its names count only where you ask for it


@dataclass(frozen=True)
class Name:
    """One name in one framework; ``str()`` is what you write there."""

    framework: str
    name: str
    aliases: tuple[str, ...]
    precision: Precision
    hardware: str  # what it runs on
    note: str

    def __str__(self) -> str:
        return FRAMEWORKS[self.framework].setting.format(self.name)


class NoEquivalent(ValueError):  # noqa: N818 - an answer as much as an error
    """The framework has no name for the precision; ``nearest`` comes closest."""

    def __init__(self, source: Name, nearest: Name) -> None:
        self.source, self.nearest = source, nearest
        self.differences = source.precision.differences(nearest.precision)
        but = (f"{k} is {new}, not {old}" for k, (old, new) in self.differences.items())
        super().__init__(
            f"{nearest.framework} has no equivalent of {source.name!r} in "
            f"{source.framework}; nearest is {nearest.name!r}, where {'; '.join(but)}"
        )


class InexactTranslation(UserWarning):
    """The translation computes in the same dtype; the text says what differs."""


SCALERS = {
    "none": "the loss is not scaled",
    "torch": "from 2**16, doubled after 2000 clean steps in a row",
    "DeepSpeed": "from 2**16, doubled after 1000 clean steps, hysteresis 2",
    "Megatron": "from 2**32, doubled after 1000 clean steps, hysteresis 2",
    "yours": "as you scale it",
}

# key | storage | compute | reduce | main_params | optimizer_state | scaler
_PRECISIONS = """
fp64        | float64 | float64 | float64 | none | float64 | none
fp32        | float32 | float32 | float32 | none | float32 | none
fp16        | float16 | float16 | float16 | none | float16 | none
bf16        | bfloat16 | bfloat16 | bfloat16 | none | bfloat16 | none
amp-fp16    | float32 | float16 | float32 | none | float32 | torch
amp-bf16    | float32 | bfloat16 | float32 | none | float32 | none
amp-raw     | float32 | float16 | float32 | none | float32 | none
fsdp-fp16   | float32 | float16 | float16 | none | float32 | torch
fsdp-bf16   | float32 | bfloat16 | bfloat16 | none | float32 | none
main-bf16   | bfloat16 | bfloat16 | bfloat16 | float32 | float32 | none
main-fp16   | float16 | float16 | float16 | float32 | float32 | DeepSpeed
mcore-bf16  | bfloat16 | bfloat16 | float32 | float32 | float32 | none
mcore-fp16  | float16 | float16 | float16 | float32 | float32 | Megatron
mcore-wide  | float16 | float16 | float32 | float32 | float32 | Megatron
flash-bf16  | bfloat16 | bfloat16 | bfloat16 | 24 bits | 8 bits | none
flash-fp16  | float16 | float16 | float16 | 24 bits | 8 bits | none
te-bf16     | bfloat16 | FP8 hybrid, delayed scaling | bfloat16 | none | bfloat16 | none
te-fp16     | float16 | FP8 hybrid, delayed scaling | float16 | none | float16 | none
te-delayed  | yours | FP8 hybrid, delayed scaling | yours | yours | yours | yours
te-current  | yours | FP8 hybrid, current scaling | yours | yours | yours | yours
te-blocks   | yours | FP8 E4M3, blocks of 128 | yours | yours | yours | yours
te-mx       | yours | FP8 E4M3, MX blocks of 32 | yours | yours | yours | yours
te-nvfp4    | yours | FP4 E2M1, NVFP4 blocks of 16 | yours | yours | yours | yours
fp8-backend | float32 | FP8 of the backend | float32 | none | float32 | none
"""

# framework (* marks special ones) | what you write | what it was checked against
_FRAMEWORKS = """
torch | {} | ran on a CPU, torch 2.13.0
lightning | precision="{}" | ran on a CPU, lightning 2.6.6
*lightning-fsdp | strategy="fsdp", precision="{}" | plugin ran on a CPU, 2.6.6
*lightning-deepspeed | strategy="deepspeed", precision="{}" | plugin ran on a CPU, 2.6.6
nemo | trainer.precision: {} | read, nemo-toolkit 3.0.0
nemo-framework | {} | read, NVIDIA/NeMo 8cfedd72; recipes ran, nemo-toolkit 2.7.3
megatron-bridge | mixed_precision="{}" | read, NVIDIA-NeMo/Megatron-Bridge v0.6.0
megatron | {} | read, NVIDIA/Megatron-LM d98e8a64 (2026-08-22)
nemo-rl | policy.precision: {} | read, NVIDIA-NeMo/RL 7ea279ab (2026-08-22)
*nemo-rl-megatron | policy.precision: {} | read, NVIDIA-NeMo/RL 7ea279ab (2026-08-22)
accelerate | mixed_precision="{}" | ran on a CPU, accelerate 1.15.0
deepspeed | {}: enabled | read, deepspeedai/DeepSpeed edaa7221 (0.19.6)
transformer-engine | te.autocast(recipe={}()) | read, transformer-engine 2.20.2
"""

# frameworks | key of a precision | name = alias = alias | runs on | note
_NAMES = """
torch | fp32 | model.to(torch.float32) | any
torch | fp64 | model.to(torch.float64) | any but MPS
torch | fp16 | model.to(torch.float16) | any | AdamW's eps=1e-8 is 0 in FP16
torch | bf16 | model.to(torch.bfloat16) | any
torch | amp-fp16 | torch.autocast(device, torch.float16) + GradScaler(device) | any
torch | amp-bf16 | torch.autocast(device, torch.bfloat16) | any
torch | amp-raw | torch.autocast(device, torch.float16) | any | gradients underflow
lightning nemo | fp32 | 32-true = 32 | any | the default
lightning nemo | fp64 | 64-true = 64 | any but MPS
lightning | fp16 | 16-true | any | AdamW's eps=1e-8 is 0 in FP16
lightning | bf16 | bf16-true | any
lightning nemo | amp-fp16 | 16-mixed = 16 | CUDA, MPS | a CPU trains in bf16-mixed
lightning nemo | amp-bf16 | bf16-mixed = bf16 | any
lightning nemo | te-bf16 | transformer-engine | sm89 | DelayedScaling on any GPU
lightning nemo | te-fp16 | transformer-engine-float16 | sm89 | DelayedScaling on any GPU
lightning-fsdp lightning-deepspeed | fp32 | 32-true = 32 | CUDA
lightning-fsdp | fp16 | 16-true | CUDA
lightning-fsdp | bf16 | bf16-true | CUDA
lightning-fsdp | fsdp-fp16 | 16-mixed = 16 | CUDA
lightning-fsdp | fsdp-bf16 | bf16-mixed = bf16 | CUDA
lightning-deepspeed | main-fp16 | 16-mixed = 16 = 16-true | CUDA | no autocast
lightning-deepspeed | main-bf16 | bf16-mixed = bf16 = bf16-true | CUDA | no autocast
nemo | fp16 | fp16-true | any | tensors under keys with "audio" are not cast
nemo | fp16 | 16-true | any | audio is cast as well
nemo | bf16 | bf16-true | any | tensors under keys with "audio" are not cast
nemo | flash-bf16 | bf16-flash = bf16-automodel | CUDA | with flashoptim.FlashAdamW
nemo | flash-fp16 | fp16-flash = fp16-automodel | CUDA | with flashoptim.FlashAdamW
nemo-framework | mcore-bf16 | bf16_mixed | CUDA | a recipe
nemo-framework | mcore-fp16 | fp16_mixed | CUDA | a recipe
nemo-framework | mcore-bf16 | bf16-mixed = bf16 | CUDA | a string
nemo-framework | mcore-wide | 16-mixed = 16 = fp16 = fp16-mixed | CUDA | a string
nemo-framework | fp32 | 32 = fp32 | CUDA | a string; any other is taken for it
megatron-bridge | mcore-bf16 | bf16_mixed = bf16-mixed | CUDA
megatron-bridge | mcore-fp16 | fp16_mixed = fp16-mixed | CUDA
megatron | fp32 | no flag | CUDA
megatron | mcore-bf16 | --bf16 = bf16 | CUDA | unless with --grad-reduce-in-bf16
megatron | mcore-fp16 | --fp16 = fp16 | CUDA
nemo-rl nemo-rl-megatron | fp32 | float32 | CUDA
nemo-rl | amp-bf16 | bfloat16 | CUDA | the default
nemo-rl | amp-raw | float16 | CUDA | nothing scales the loss
nemo-rl-megatron | main-bf16 | bfloat16 | CUDA | grad_reduce_in_fp32: false, as shipped
nemo-rl-megatron | mcore-fp16 | float16 | CUDA | set optimizer.fp16: true as well
accelerate | fp32 | no | any | the default
accelerate | amp-fp16 | fp16 | any GPU | a CPU trains in float32, without a warning
accelerate | amp-bf16 | bf16 | any
accelerate | fp8-backend | fp8 | sm89 | an older GPU trains in fp16
deepspeed | fp32 | neither fp16 nor bf16 | any
deepspeed | main-fp16 | fp16 | any GPU
deepspeed | main-bf16 | bf16 = bfloat16 | any
transformer-engine | te-delayed | DelayedScaling | sm89
transformer-engine | te-current | Float8CurrentScaling | sm89
transformer-engine | te-blocks | Float8BlockScaling | sm90, CUDA 12.9
transformer-engine | te-mx | MXFP8BlockScaling | sm100, not sm120
transformer-engine | te-nvfp4 | NVFP4BlockScaling | sm100
"""

# What Megatron Core does in FP8 and FP4: recipe of Megatron-Bridge | in | compute |
# hardware | flags of Megatron-LM
_RECIPES = """
{}_with_fp8_delayed_scaling_mixed | bf16 fp16 | FP8 hybrid, delayed scaling | sm89 | \
--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 \
--fp8-amax-compute-algo max --fp8-param-gather
{}_with_fp8_current_scaling_mixed | bf16 fp16 | \
FP8 hybrid, current scaling, 1 + 1 layers in 16 bits | sm89 | --fp8-format hybrid \
--fp8-recipe tensorwise --first-last-layers-bf16 --fp8-param-gather
nemotron_h_{}_with_fp8_current_scaling_mixed | bf16 | \
FP8 hybrid, current scaling, 2 + 2 layers in 16 bits | sm89 | --fp8-format hybrid \
--fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 \
--num-layers-at-end-in-bf16 2 --fp8-param-gather
nanov2_{}_with_fp8_current_scaling_mixed | bf16 | \
FP8 hybrid, blocks of 128, 2 + 2 layers in 16 bits | sm90, CUDA 12.9 | --fp8-format \
hybrid --fp8-recipe blockwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 \
--num-layers-at-end-in-bf16 2 --fp8-param-gather
{}_with_fp8_subchannel_scaling_mixed | bf16 fp16 | FP8 hybrid, blocks of 128 | \
sm90, CUDA 12.9 | --fp8-format hybrid --fp8-recipe blockwise
{}_with_mxfp8_mixed | bf16 fp16 | FP8 E4M3, MX blocks of 32 | sm100, not sm120 | \
--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather \
--reuse-grad-buf-for-mxfp8-param-ag
{}_with_nvfp4_mixed | bf16 | FP4 E2M1, NVFP4 blocks of 16 | sm100 | --fp4-format e2m1 \
--fp4-recipe nvfp4 --fp4-param-gather
nemotron_3_super_{}_with_nvfp4_mixed | bf16 | \
FP4 E2M1, NVFP4 blocks of 16, 0 + 14 layers in 16 bits | sm100 | --fp4-format e2m1 \
--fp4-recipe nvfp4 --first-last-layers-bf16 --num-layers-at-start-in-bf16 0 \
--num-layers-at-end-in-bf16 14 --fp4-param-gather
"""


def _rows(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _read_names() -> list[Name]:
    precisions = {key: Precision(*cells) for key, *cells in _rows(_PRECISIONS)}
    names = []
    for frameworks, key, spellings, hardware, *note in _rows(_NAMES):
        name, *aliases = spellings.split(" = ")
        about = (name, tuple(aliases), precisions[key], hardware, "".join(note))
        names += [Name(framework, *about) for framework in frameworks.split()]
    for recipe, halves, compute, hardware, flags in _rows(_RECIPES):
        for half in halves.split():
            core = replace(precisions[f"mcore-{half}"], compute=compute)
            for eight_or_four in ("fp8", "fp4"):
                if f"--{eight_or_four}-param-gather" in flags:
                    core = replace(core, storage=eight_or_four.upper())
            own = recipe.format(half)
            also = (own.replace("_", "-"),)
            names.append(Name("megatron-bridge", own, also, core, hardware, ""))
            names.append(Name("megatron", f"--{half} {flags}", (), core, hardware, ""))
            if "nvfp4" not in own:
                own = own.replace("_delayed_scaling", "")
                names.append(
                    Name("nemo-framework", own, (), core, hardware, "a recipe")
                )
    return names


FRAMEWORKS = {
    key.lstrip("*"): Framework(setting, checked, special=key.startswith("*"))
    for key, setting, checked in _rows(_FRAMEWORKS)
}
NAMES = tuple(_read_names())


def lookup(name: str | int, framework: str | None = None) -> tuple[Name, ...]:
    """Find what a name stands for, in one framework or in every one that knows it.

    Args:
        name: Spelled as the framework wants it, case included; 16 is the name "16".
        framework: A key of `FRAMEWORKS`. Without it, special ones are left out unless
            only they have the name.

    Returns:
        At least one row; several may have equal precisions.

    Raises:
        TypeError: ``name`` is neither a string nor a whole number.
        ValueError: There is no such framework, or no such name in it; the message
            gives the nearest ones.

    Example:
        >>> [(row.framework, row.precision.storage) for row in lookup("float16")]
        [('nemo-rl', 'float32')]
    """
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise TypeError(f"name must be a string such as 'bf16-mixed', got {name!r}")
    name = str(name)
    if framework is not None:
        _check_framework("framework", framework)
    found = [row for row in NAMES if name in {row.name, *row.aliases}]
    ordinary = [row for row in found if not FRAMEWORKS[row.framework].special]
    if framework is None and found:
        return tuple(ordinary or found)
    there = [row for row in NAMES if framework in {None, row.framework}]
    if here := tuple(row for row in found if row in there):
        return here
    message = f"{name!r} is no precision name" + (
        f" in {framework}" if framework else ""
    )
    for row in found:
        for same in there:
            if same.precision == row.precision:
                message += f"; what it is in {row.framework} is {same.name!r} here"
                raise ValueError(message)
    known = [spelling for row in there for spelling in (row.name, *row.aliases)]
    raise ValueError(message + _nearest(name, known))


def translate(
    name: str | int, *, to: str, framework: str | None = None, exact: bool = False
) -> str:
    """Find the name of the same precision in another framework.

    Where there is none, the nearest name that computes in the same dtype is the answer,
    with an `InexactTranslation` warning that names every difference.

    Args:
        name: As in `lookup`.
        to: The framework whose name is wanted; the first one, if it has several.
        framework: The framework that ``name`` is from. You need to say it only where
            the name means different things.
        exact: Refuse an answer that differs in any of the six fields.

    Returns:
        The name that has the same precision there, or comes nearest.

    Raises:
        TypeError: As in `lookup`.
        ValueError: As in `lookup`, or ``name`` means different things.
        NoEquivalent: ``to`` computes in no such dtype, or ``exact`` and something else
            differs; the error says what comes nearest.

    Example:
        >>> translate("16-true", to="nemo")
        'fp16-true'
    """  # noqa: DOC502 - lookup raises the first
    _check_framework("to", to)
    rows = lookup(name, framework)
    source = rows[0]
    changed = {k for row in rows for k in source.precision.differences(row.precision)}
    if fields := [field for field in asdict(source.precision) if field in changed]:
        meanings = [
            f"{row.framework} has "
            + ", ".join(f"{field} {getattr(row.precision, field)}" for field in fields)
            for row in rows
        ]
        raise ValueError(
            f"{str(name)!r} means different things, say framework=: "
            + "; ".join(meanings)
        )
    there = [row for row in NAMES if row.framework == to]
    nearest = min(there, key=lambda row: _distance(source.precision, row.precision))
    if nearest.precision != source.precision:
        inexact = NoEquivalent(source, nearest)
        if exact or "compute" in inexact.differences:
            raise inexact
        warnings.warn(str(inexact), InexactTranslation, stacklevel=2)
    return nearest.name


def explain(name: str | int, framework: str | None = None) -> str:
    """Describe each meaning of a name, and what the same is called elsewhere.

    Args:
        name: As in `lookup`.
        framework: As in `lookup`.

    Returns:
        A paragraph for each meaning.

    Raises:
        TypeError: As in `lookup`.
        ValueError: As in `lookup`.
    """  # noqa: DOC502 - lookup raises them
    rows = lookup(name, framework)
    paragraphs = []
    for precision in dict.fromkeys(row.precision for row in rows):
        lines = [str(name)]
        lines += [f"  {key:16} {value}" for key, value in asdict(precision).items()]
        lines[-1] += f", {SCALERS[precision.scaler]}"
        here = [row for row in rows if row.precision == precision]
        for row in here:
            facts = [str(row), f"on {row.hardware}", row.note]
            facts.append(FRAMEWORKS[row.framework].checked)
            lines.append(f"  in {row.framework}: " + "; ".join(filter(None, facts)))
        for row in NAMES:
            if row.precision == precision and row not in here:
                lines.append(f"  same in {row.framework}: {row.name}")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python precision_names.py bf16-true --to nemo-rl``, or without ``--to``."""
    parser = argparse.ArgumentParser(
        description="explain or translate a precision name"
    )
    parser.add_argument("name")
    parser.add_argument("--framework", help="the framework that the name is from")
    parser.add_argument("--to", help="the framework whose name is wanted")
    parser.add_argument("--exact", action="store_true", help="no nearest name will do")
    given = parser.parse_args(arguments)
    try:
        if given.to is None:
            answer = explain(given.name, given.framework)
        else:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                answer = translate(
                    given.name,
                    to=given.to,
                    framework=given.framework,
                    exact=given.exact,
                )
            sys.stderr.writelines(f"{warning.message}\n" for warning in told)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{answer}\n")


def _check_framework(argument: str, given: str) -> None:
    if given not in list(FRAMEWORKS):
        known = ", ".join(FRAMEWORKS)
        nearest = _nearest(str(given), FRAMEWORKS)
        raise ValueError(f"{argument} must be one of {known}; got {given!r}{nearest}")


def _nearest(given: str, known: Iterable[str]) -> str:
    folded = {name.lower(): name for name in known}
    close = get_close_matches(given.strip().lower(), folded, cutoff=0.0)
    return "; nearest: " + ", ".join(repr(folded[key]) for key in close)


def _distance(a: Precision, b: Precision) -> tuple[bool, int, int]:
    """Compare what they compute in, word by word, before all else."""
    x, y = a.compute.split(), b.compute.split()
    return x[0] != y[0], len({*x} ^ {*y}), len(a.differences(b))


if __name__ == "__main__":
    main()
