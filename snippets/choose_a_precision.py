"""Recommend a precision for a device, a framework, a model size and a task.

Copy this file into your project; it needs only Python.

Rules are rows of tables: the first that fits the task and the device, and for which the
framework has a name, is the answer. Each alternative and warning that fits is told.

    Guide:   guide/choose_a_precision
    Tests:   tests/test_choose_a_precision.py
    Sources: NVIDIA, CUDA GPU Compute Capability and CUDA Programming Guide 13 (2026),
             section 5.1 (what each compute capability has); makers' lists of their GPUs
             (memory); Transformer Engine 2.20.2, pytorch/quantization.py (FP8, FP4);
             AMD, ROCm precision support (2024); pytorch/pytorch#139386 and
             huggingface/transformers#40458 (BF16 on Apple's GPUs); the bytes are those
             of snippets/memory_ledger.py, the names those of precision_names.py.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

__all__ = ["ADAPTERS", "FRAMEWORKS", "HARDWARE", "TASKS", "Alternative", "Hardware"]
__all__ += ["NoRecommendation", "Note", "Recommendation", "devices_needed"]
__all__ += ["recommend_precision", "written"]

ADAPTERS = 0.01  # of LoRA, for each parameter of the model
KINDS = ("weights", "main params", "gradients", "optimizer", "casts")
TASKS = {
    "pretrain": "train all weights from the start",
    "finetune": "train all weights further",
    "lora": "train adapters beside frozen weights",
    "rl": "train a policy on what it generates",
    "speech": "train on audio",
    "inference": "forward passes only",
    "scientific": "solve, integrate, or reproduce to many digits",
}
_TRAIN = ("pretrain", "finetune", "lora", "rl", "speech")

# key | device | compute capability | GB of one device, as its maker lists it | what it
# has; slow64: float64 at 1/32 of float32's rate or less
_HARDWARE = """
cpu      | CPU                 |      |     | cpu fp64
t4       | NVIDIA T4           | 7.5  | 16  | gpu cuda old fp64 slow64
v100     | NVIDIA V100         | 7.0  | 32  | gpu cuda old fp64
a100     | NVIDIA A100         | 8.0  | 80  | gpu cuda bf16 tf32 fp64
rtx-3090 | NVIDIA RTX 3090     | 8.6  | 24  | gpu cuda bf16 tf32 fp64 slow64
rtx-4090 | NVIDIA RTX 4090     | 8.9  | 24  | gpu cuda bf16 tf32 fp64 slow64 fp8
l40s     | NVIDIA L40S         | 8.9  | 48  | gpu cuda bf16 tf32 fp64 slow64 fp8
h100     | NVIDIA H100         | 9.0  | 80  | gpu cuda bf16 tf32 fp64 fp8 blocks
h200     | NVIDIA H200         | 9.0  | 141 | gpu cuda bf16 tf32 fp64 fp8 blocks
b200     | NVIDIA B200         | 10.0 | 180 | gpu cuda bf16 tf32 fp64 fp8 blocks mx fp4
rtx-5090 | NVIDIA RTX 5090     | 12.0 | 32  | gpu cuda bf16 tf32 fp64 slow64 fp8 blocks no-mx
mi300x   | AMD Instinct MI300X |      | 192 | gpu rocm bf16 fp64
mps      | Apple GPU (MPS)     |      |     | gpu mps
"""  # noqa: E501

# framework | what you write, with {} for the name | runs on | tasks
_FRAMEWORKS = """
torch | {} | cpu cuda rocm mps | *
lightning | precision="{}" | cpu cuda rocm mps | *
lightning-fsdp | strategy="fsdp", precision="{}" | cuda rocm | train
lightning-deepspeed | strategy="deepspeed", precision="{}" | cuda rocm | train
nemo | trainer.precision: {} | cpu cuda mps | *
nemo-framework | {} | cuda | pretrain finetune lora
megatron-bridge | mixed_precision="{}" | cuda | pretrain finetune lora
megatron | {} | cuda | pretrain finetune
nemo-rl | policy.precision: {} | cuda | rl finetune
nemo-rl-megatron | policy.precision: {} | cuda | rl finetune
accelerate | mixed_precision="{}" | cpu cuda rocm mps | *
deepspeed | {}: enabled | cpu cuda rocm | train
transformer-engine | te.autocast(recipe={}()) | fp8 | pretrain finetune inference
"""

# key | storage | compute | reduce | main_params | optimizer_state | scaler
_PRECISIONS = """
fp64       | float64 | float64 | float64 | none | float64 | none
fp32       | float32 | float32 | float32 | none | float32 | none
fp16       | float16 | float16 | float16 | none | float16 | none
bf16       | bfloat16 | bfloat16 | bfloat16 | none | bfloat16 | none
amp-fp16   | float32 | float16 | float32 | none | float32 | torch
amp-bf16   | float32 | bfloat16 | float32 | none | float32 | none
fsdp-fp16  | float32 | float16 | float16 | none | float32 | torch
fsdp-bf16  | float32 | bfloat16 | bfloat16 | none | float32 | none
main-bf16  | bfloat16 | bfloat16 | bfloat16 | float32 | float32 | none
main-fp16  | float16 | float16 | float16 | float32 | float32 | DeepSpeed
mcore-bf16 | bfloat16 | bfloat16 | float32 | float32 | float32 | none
mcore-fp16 | float16 | float16 | float16 | float32 | float32 | Megatron
mcore-fp8  | FP8 | FP8 hybrid, current scaling, 1 + 1 layers in 16 bits | float32 | float32 | float32 | none
mcore-mx   | FP8 | FP8 E4M3, MX blocks of 32 | float32 | float32 | float32 | none
mcore-fp4  | FP4 | FP4 E2M1, NVFP4 blocks of 16 | float32 | float32 | float32 | none
te-bf16    | bfloat16 | FP8 hybrid, delayed scaling | bfloat16 | none | bfloat16 | none
te-delayed | yours | FP8 hybrid, delayed scaling | yours | yours | yours | yours
te-current | yours | FP8 hybrid, current scaling | yours | yours | yours | yours
te-blocks  | yours | FP8 E4M3, blocks of 128 | yours | yours | yours | yours
te-mx      | yours | FP8 E4M3, MX blocks of 32 | yours | yours | yours | yours
te-nvfp4   | yours | FP4 E2M1, NVFP4 blocks of 16 | yours | yours | yours | yours
"""  # noqa: E501

# frameworks | precision, its name there; ...
_NAMES = """
torch | fp32 model.to(torch.float32); fp64 model.to(torch.float64); \
fp16 model.to(torch.float16); bf16 model.to(torch.bfloat16); \
amp-bf16 torch.autocast(device, torch.bfloat16); \
amp-fp16 torch.autocast(device, torch.float16) + GradScaler(device)
lightning nemo | fp32 32-true; fp64 64-true; amp-fp16 16-mixed; amp-bf16 bf16-mixed; \
bf16 bf16-true; te-bf16 transformer-engine
lightning | fp16 16-true
nemo | fp16 fp16-true
lightning-fsdp | fp32 32-true; bf16 bf16-true; fsdp-fp16 16-mixed; fsdp-bf16 bf16-mixed
lightning-deepspeed | fp32 32-true; main-fp16 16-mixed; main-bf16 bf16-mixed
nemo-framework megatron-bridge | mcore-bf16 bf16_mixed; mcore-fp16 fp16_mixed; \
mcore-fp8 bf16_with_fp8_current_scaling_mixed; mcore-mx bf16_with_mxfp8_mixed
megatron-bridge | mcore-fp4 bf16_with_nvfp4_mixed
megatron | fp32 no flag; mcore-bf16 --bf16; mcore-fp16 --fp16; mcore-fp8 \
--bf16 --fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16 \
--fp8-param-gather; \
mcore-mx --bf16 --fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather \
--reuse-grad-buf-for-mxfp8-param-ag; \
mcore-fp4 --bf16 --fp4-format e2m1 --fp4-recipe nvfp4 --fp4-param-gather
nemo-rl nemo-rl-megatron | fp32 float32
nemo-rl | amp-bf16 bfloat16
nemo-rl-megatron | main-bf16 bfloat16; mcore-fp16 float16
accelerate | fp32 no; amp-fp16 fp16; amp-bf16 bf16
deepspeed | fp32 neither fp16 nor bf16; main-fp16 fp16; main-bf16 bf16
transformer-engine | te-delayed DelayedScaling; te-current Float8CurrentScaling; \
te-blocks Float8BlockScaling; te-mx MXFP8BlockScaling; te-nvfp4 NVFP4BlockScaling
"""
# bitsandbytes' NF4 is no precision of these frameworks, but a form of frozen weights.
_NF4 = {
    "torch": 'bitsandbytes.nn.Linear4bit(..., quant_type="nf4")',
    "lightning": 'plugins=BitsandbytesPrecision("nf4")',
    "accelerate": 'BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
}

_MIXED = "amp-bf16 fsdp-bf16 mcore-bf16 main-bf16"
_MIXED_FP16 = "amp-fp16 fsdp-fp16 mcore-fp16 main-fp16"
# tasks | the device has, ! not | precisions, best first | why | page
_RULES = f"""
scientific | fp64 | fp64 | differences of close numbers, long sums and linear systems \
use up the 24 bits of float32 | guide/double_precision
* | mx | te-mx | a scale for every 32 values, which the GPU applies itself, confines \
an outlier to its block | guide/fp8
* | fp8 | te-current | no state, nothing to tune, and nothing is clipped | guide/fp8
inference | gpu bf16 | bf16 | nothing is updated, so nothing is lost by \
weights in 16 bits; BF16 has the range of float32 | guide/true_half
inference | gpu !bf16 | fp16 | nothing is updated, so nothing is lost by \
weights in 16 bits, and this GPU computes in FP16 | guide/true_half
inference | gpu bf16 | amp-bf16 | products in BF16; the weights stay as they are \
loaded, here counted in float32 | guide/mixed_precision
inference | gpu !bf16 | amp-fp16 | products in FP16; the weights stay as they are \
loaded, here counted in float32 | guide/mixed_precision
train | gpu bf16 | {_MIXED} | products in BF16, which has the range of float32 and \
needs no loss scale; the optimizer steps weights in float32 | guide/mixed_precision
train | gpu !bf16 | {_MIXED_FP16} | this GPU computes in FP16, whose range needs a \
loss scale; the optimizer steps weights in float32 | guide/loss_scaling
train | gpu !bf16 | fp32 | FP16 comes without a loss scale here, so that gradients \
underflow: float32 is what is left | guide/nemo_rl
inference train | cpu | fp32 | a CPU without BF16 instructions converts number by \
number, and 16 bits are then slower than 32 | failures/half_on_cpu_is_slow
"""

# tasks | the device has | one precision | what it trades | page
_ALTERNATIVES = """
pretrain finetune rl speech | bf16 | bf16 | half the bytes, but updates below half a \
step of BF16 are lost without a remedy | guide/true_half
pretrain finetune | fp8 | te-bf16 | products in FP8; weights and AdamW in BF16, so \
that small updates are lost | guide/fp8
pretrain finetune | fp8 | mcore-fp8 | products in FP8, but for the first and the last \
layer | guide/nemo_recipes
pretrain finetune | mx | mcore-mx | products in FP8 with scales for blocks of 32 | \
guide/nemo_recipes
pretrain finetune | fp4 | mcore-fp4 | products in FP4, at 3 to 4 times \
the rounding error of FP8 | guide/nemo_recipes
* | fp8 | te-delayed | scales from past steps: a pass less over each tensor, but \
a sudden outlier is clipped | guide/fp8
* | mx | te-current | one scale a tensor, as on Hopper | guide/fp8
* | blocks | te-blocks | scales for blocks of 128, where outliers hurt | guide/fp8
* | fp4 | te-nvfp4 | products in FP4, at 3 to 4 times the rounding error of FP8 | \
guide/fp8
lora | cuda | nf4 | the frozen weights in 4.5 bits, rounded to 16 values a block \
(QLoRA) | guide/quantized_layers
inference | cuda | nf4 | the weights of linear layers in 4.5 bits | \
guide/quantized_layers
inference | bf16 | fp16 | three bits more than BF16, if no activation exceeds 65504 | \
guide/true_half
train | mps | amp-bf16 | no loss scale, on M3 or newer and macOS 14 | \
guide/choose_a_precision
train | cpu | amp-bf16 | faster on a CPU with AMX or AVX512-BF16, and no loss scale | \
guide/mixed_precision
inference | cpu | bf16 | half the bytes, and faster on a CPU with AMX or AVX512-BF16 | \
guide/true_half
train inference | gpu | fp32 | the run to compare with when the loss is wrong | \
guide/debug_nan
scientific | fp64 | fp32 | half the bytes, with compensated sums where digits cancel | \
guide/double_precision
"""

# tasks | the device has | precisions | frameworks | what to know | page
_WARNINGS = """
* | old | * | * | torch.cuda.is_bf16_supported() is True here, for an emulation: ask \
with including_emulation=False | guide/mixed_precision
train | gpu | amp-fp16 fsdp-fp16 | * | clip gradients after unscale_, and step the \
scheduler only when the optimizer stepped | guide/loss_scaling
* | mps | * | * | BF16 needs macOS 14 here, and M1 and M2 emulate it | \
guide/choose_a_precision
* | mps | fp16 amp-fp16 | torch accelerate | GradScaler("mps") needs torch 2.8 | \
guide/choose_a_precision
* | cpu | * | lightning nemo | "16-mixed" is replaced by "bf16-mixed" on a CPU | \
failures/precision_is_replaced_on_a_cpu
* | rocm | * | * | FP8 on this GPU is another format, e4m3fnuz: weights in \
FP8 of other GPUs must be converted | background/number_formats
pretrain finetune rl speech | * | amp-bf16 amp-fp16 | * | with few rows a batch, mixed \
precision takes more memory than float32 | failures/mixed_precision_uses_more_memory
lora | * | amp-bf16 amp-fp16 | * | store the frozen weights in 16 bits yourself, and \
the adapters in float32: autocast changes neither | guide/mixed_precision
lora | * | fsdp-bf16 fsdp-fp16 | * | FSDP shards weights of one dtype together: frozen \
ones are counted in float32 | guide/mixed_precision
rl | * | * | * | the engine that generates holds weights of its own, and its \
log-probabilities differ | failures/log_probs_differ_between_engines
speech | * | * | * | compute spectrograms, lengths and masks outside of 16 bits | \
guide/half_precision_for_audio
* | no-mx | * | transformer-engine | TE has no MXFP8 on this GPU | guide/fp8
* | * | te-current te-mx | * | dimensions of products must be multiples of 16, in \
MXFP8 of 32 | failures/dimensions_not_divisible
* | * | te-current te-mx | * | checkpoints have _extra_state, which nn.Linear neither \
writes nor reads | failures/extra_state_in_the_checkpoint
scientific | tf32 | * | * | in float32, TF32 makes products less precise where it is \
on | failures/tf32_flags_mixed
* | slow64 | fp64 | * | this GPU computes float64 at 1/32 of the rate of float32, or \
less | guide/double_precision
"""

_SIZES = {"float64": 8.0, "float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "none": 0.0}
_SIZES |= {"yours": 4.0, "FP8": 1.0, "FP4": 0.5}  # Transformer Engine's layers: float32
SHARD = "{total} of these kinds are more than the {memory} GB of one {device}: shard \
over at least {devices}, and more for activations"


@dataclass(frozen=True)
class Note:
    """Something to know, and the page of the guide that explains it."""

    text: str
    page: str


@dataclass(frozen=True)
class Hardware:
    """A device; ``memory`` in GB and the capability are None where it has no one."""

    device: str
    capability: str | None
    memory: int | None
    has: frozenset[str]


@dataclass(frozen=True)
class Alternative:
    """Another setting; `Recommendation` says what the fields are."""

    name: str
    setting: str
    precision: dict[str, str]
    bytes_per_parameter: tuple[float, ...]
    why: Note


@dataclass(frozen=True)
class Recommendation:
    """What to write, why, what it holds in memory, and what to look out for.

    Attributes:
        name: Of the precision, as the framework writes it.
        setting: The line with it.
        precision: What happens to each kind of number, as in precision_names; empty
            for NF4, which is a form of frozen weights.
        bytes_per_parameter: Of each of `KINDS`, on one device, without activations.
        why: The rule that decided.
        warnings: All that fit.
        alternatives: Settings with other trades, in the same framework.
    """

    hardware: str
    framework: str
    task: str
    parameters: float
    name: str
    setting: str
    precision: dict[str, str]
    bytes_per_parameter: tuple[float, ...]
    why: Note
    warnings: tuple[Note, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of each kind, unsharded; what a step's activations take is yours."""
        each = zip(KINDS, self.bytes_per_parameter, strict=True)
        return {kind: int(self.parameters * size) for kind, size in each}

    def __str__(self) -> str:
        memory = self.memory
        kinds = ", ".join(f"{written(n)} {kind}" for kind, n in memory.items() if n)
        lines = [self.setting, f"  because {self.why.text} ({self.why.page})"]
        lines += [f"  holds {written(sum(memory.values()))}: {kinds}"]
        lines += [f"  note: {note.text} ({note.page})" for note in self.warnings]
        for other in self.alternatives:
            total = sum(int(self.parameters * b) for b in other.bytes_per_parameter)
            lines.append(f"  or {other.setting} in {written(total)}: {other.why.text}")
        return "\n".join(lines)


class NoRecommendation(ValueError):  # noqa: N818 - an answer as much as an error
    """The framework cannot do that; ``nearest`` is what can, on this device if any."""

    def __init__(self, why: Note, nearest: Recommendation) -> None:
        self.why, self.nearest = why, nearest
        super().__init__(
            f"{why.text}; nearest is {nearest.setting} with {nearest.framework} on "
            f"{nearest.hardware}"
        )


def _rows(table: str) -> list[list[str]]:
    return [[c.strip() for c in row.split("|")] for row in table.strip().splitlines()]


def _read_names() -> Iterator[tuple[tuple[str, str], str]]:
    for frameworks, names in _rows(_NAMES):
        for pair in names.split("; "):
            key, name = pair.split(" ", 1)
            yield from (((framework, key), name) for framework in frameworks.split())


HARDWARE = {
    key: Hardware(device, cc or None, int(gb) if gb else None, frozenset(has.split()))
    for key, device, cc, gb, has in _rows(_HARDWARE)
}
FRAMEWORKS = {key: setting for key, setting, _, _ in _rows(_FRAMEWORKS)}
_FIELDS = ("storage", "compute", "reduce", "main_params", "optimizer_state", "scaler")
_CELLS = {key: dict(zip(_FIELDS, c, strict=True)) for key, *c in _rows(_PRECISIONS)}
_KNOWN = dict(_read_names())


def recommend_precision(
    hardware: str = "h100",
    framework: str = "lightning",
    parameters: float = 7e9,
    task: str = "pretrain",
) -> Recommendation:
    """Look the answer up in the rules; the same question has the same answer always.

    Args:
        hardware: A key of `HARDWARE`.
        framework: A key of `FRAMEWORKS`, which are those of precision_names.
        parameters: Of the whole model, above 0 and up to 1e15. Of LoRA, the adapters
            (`ADAPTERS`) are counted on top.
        task: A key of `TASKS`.

    Raises:
        TypeError: ``parameters`` is not a number.
        ValueError: There is no such key, or no such number of parameters.
        NoRecommendation: The framework does not run there, is not for the task, or has
            no name for what the rules ask; it carries what is nearest.

    Example:
        >>> answer = recommend_precision("t4", "lightning", 125e6, "finetune")
        >>> answer.name, answer.memory["optimizer"]
        ('16-mixed', 1000000000)
    """
    for argument, given, known in (
        ("hardware", hardware, HARDWARE),
        ("framework", framework, FRAMEWORKS),
        ("task", task, TASKS),
    ):
        if given not in list(known):
            close = get_close_matches(str(given).lower(), known, n=3, cutoff=0.0)
            raise ValueError(
                f"{argument} must be one of {', '.join(known)}; got {given!r}; "
                f"nearest: {', '.join(map(repr, close))}"
            )
    if isinstance(parameters, bool) or not isinstance(parameters, int | float):
        raise TypeError(f"parameters must be a number such as 7e9, got {parameters!r}")
    if not 1 <= parameters <= 1e15:
        raise ValueError(f"parameters must be from 1 to 1e15, got {parameters!r}")
    found = _recommend(hardware, framework, float(parameters), task)
    if isinstance(found, Recommendation):
        return found
    tries = [(hardware, "torch"), ("cpu", framework), ("cpu", "torch")]
    answers = (_recommend(h, f, float(parameters), task) for h, f in tries)
    raise NoRecommendation(
        found, next(a for a in answers if isinstance(a, Recommendation))
    )


def _recommend(
    hardware: str, framework: str, parameters: float, task: str
) -> Recommendation | Note:
    has = HARDWARE[hardware].has
    [(runs_on, tasks)] = [c[2:] for c in _rows(_FRAMEWORKS) if c[0] == framework]
    device = HARDWARE[hardware].device
    if not has & set(runs_on.split()):
        kinds = " or ".join(runs_on.upper().split())
        kinds = kinds.replace("FP8", "NVIDIA's GPUs with FP8")  # AMD's have another one
        page = "guide/fp8" if runs_on == "fp8" else "guide/precision_names"
        return Note(f"{framework} runs on {kinds}, not on {device}", page)
    if not _fits(task, tasks):
        return Note(f"{framework} is not made for {task}", "guide/precision_names")
    rules = [row for row in _rows(_RULES) if _applies(row, task, has)]
    named = [
        (key, Note(why, page))
        for *_, keys, why, page in rules
        for key in keys.split()
        if (framework, key) in _KNOWN
    ]
    if not named:
        who = f"{framework} has no name for" if rules else f"{device} has no"
        return Note(f"{who} {_CELLS['fp64']['compute']}", "guide/double_precision")
    key, why = named[0]
    others = []
    for row in _rows(_ALTERNATIVES):
        other = row[2]
        if other != key and _applies(row, task, has) and _has(framework, other):
            others.append(_alternative(framework, key, other, task, Note(*row[3:])))
    notes = [
        Note(text, page)
        for t, h, keys, frameworks, text, page in _rows(_WARNINGS)
        if _applies((t, h), task, has)
        and _fits(key, keys)
        and _fits(framework, frameworks)
    ]
    name, each = _KNOWN[framework, key], _bytes(key, task)
    total = sum(int(parameters * size) for size in each)
    if (devices := devices_needed(total, hardware)) > 1:
        note = SHARD.format(
            total=written(total),
            memory=HARDWARE[hardware].memory,
            device=device,
            devices=devices,
        )
        notes.append(Note(note, "guide/memory_ledger"))
    setting = FRAMEWORKS[framework].format(name)
    return Recommendation(
        *(hardware, framework, task, parameters, name, setting),
        *(dict(_CELLS[key]), each, why, tuple(notes), tuple(others)),
    )


def devices_needed(total: int, hardware: str) -> int:
    """Divide bytes by the memory of a device, rounded up; 1 where it is not known."""
    memory = HARDWARE[hardware].memory
    return math.ceil(total / (memory * 1e9)) if memory else 1


def written(total: int) -> str:
    """Write bytes in the largest unit below them, with one decimal, ties up."""
    units = ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)
    unit, size = next((u for u in units if total >= u[1]), ("B", 1))
    return f"{math.floor(total / size * 10 + 0.5) / 10:.1f} {unit}"


def _fits(word: str, words: str) -> bool:
    known = words.split()
    return words == "*" or word in known or ("train" in known and word in _TRAIN)


def _applies(row: Iterable[str], task: str, has: frozenset[str]) -> bool:
    tasks, needs, *_ = row
    wanted = [] if needs == "*" else needs.split()
    return _fits(task, tasks) and all(
        (need.lstrip("!") in has) != need.startswith("!") for need in wanted
    )


def _has(framework: str, key: str) -> bool:
    return framework in _NF4 if key == "nf4" else (framework, key) in _KNOWN


def _alternative(
    framework: str, key: str, other: str, task: str, why: Note
) -> Alternative:
    if other == "nf4":  # the adapters are as in the answer
        return Alternative("nf4", _NF4[framework], {}, _bytes(key, task, 4.5 / 8), why)
    name = _KNOWN[framework, other]
    setting = FRAMEWORKS[framework].format(name)
    return Alternative(name, setting, dict(_CELLS[other]), _bytes(other, task), why)


def _bytes(key: str, task: str, frozen: float | None = None) -> tuple[float, ...]:
    """Count the bytes of a parameter: b_w + 4 m + b_g + 2 b_o + 2 c of memory_ledger.

    ``frozen`` is the size of a weight that is not trained, where it is not the usual.
    """
    cells = _CELLS[key]
    sizes = {field: _SIZES.get(value, 0.0) for field, value in cells.items()}
    weight, main = sizes["storage"], sizes["main_params"]
    word = cells["compute"].split()[0]
    cast = 0.0 if word == cells["storage"] else float(_SIZES[word])
    if cells["main_params"] == "yours":
        main = 0.0
    if task == "inference":
        held = (weight, cast) if frozen is None else (frozen, 0.0)
        return float(held[0]), 0.0, 0.0, 0.0, held[1]
    if word in {"FP8", "FP4"}:  # a backward product reads the transpose as well
        cast = _SIZES[word] * (1.0 if word == cells["storage"] else 2.0)
    grad = max(weight, sizes["reduce"])
    grad += 4 if main and sizes["reduce"] < 4 else 0  # its copy in float32
    trained = (weight, main, grad, 2 * sizes["optimizer_state"], cast)
    if task != "lora":
        return tuple(map(float, trained))
    still = 0.0  # casts of frozen weights
    if frozen is None:
        amp = key.startswith("amp-")  # they are stored as they are multiplied
        frozen, still = (float(_SIZES[word]), 0.0) if amp else (float(weight), cast)
    adapters = [ADAPTERS * size for size in trained]
    return frozen + adapters[0], *adapters[1:4], still + adapters[4]
