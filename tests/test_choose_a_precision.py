"""Laws of the recommended precisions: every question is answered, in true names."""

import ast
import math
import re
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from snippets import choose_a_precision, fp8, precision_names, quantized_linear
from snippets.choose_a_precision import (
    ADAPTERS,
    FRAMEWORKS,
    HARDWARE,
    KINDS,
    TASKS,
    Alternative,
    NoRecommendation,
    Recommendation,
    devices_needed,
    written,
)
from snippets.main_params import MainParams
from snippets.memory_ledger import MemoryLedger

ROOT = Path(__file__).parents[1]
TRAIN = [task for task in TASKS if task not in {"inference", "scientific"}]
recommend = choose_a_precision.recommend_precision
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def ask(
    hardware: str, framework: str, task: str, parameters: float = 7e9
) -> Recommendation | NoRecommendation:
    """Return the answer, or the refusal."""
    try:
        return recommend(hardware, framework, parameters, task)
    except NoRecommendation as refusal:
        return refusal


ALL = {q: ask(*q) for q in product(HARDWARE, FRAMEWORKS, TASKS)}
ANSWERS = {q: a for q, a in ALL.items() if isinstance(a, Recommendation)}
REFUSALS = {q: a for q, a in ALL.items() if isinstance(a, NoRecommendation)}


def settings() -> list[tuple[str, str, Recommendation | Alternative]]:
    """Return device, framework, and what may be set there; NF4 is no precision."""
    found: list[tuple[str, str, Recommendation | Alternative]] = []
    for (hardware, framework, _), answer in ANSWERS.items():
        found.append((hardware, framework, answer))
        for other in answer.alternatives:
            if other.name != "nf4":
                found.append((hardware, framework, other))
    return found


# --------------------------------------------------------- every question


def test_every_question_has_an_answer_or_a_refusal_with_one() -> None:
    """All 13 devices, 13 frameworks and 7 tasks; what is nearest is an answer itself.

    It is for the same task, and on the same device where the device can do it at all.
    """
    assert len(ALL) == 13 * 13 * 7 == len(ANSWERS) + len(REFUSALS)
    for (hardware, framework, task), refusal in REFUSALS.items():
        nearest = refusal.nearest
        assert nearest == ALL[nearest.hardware, nearest.framework, task]
        assert refusal.why.text in str(refusal)
        assert nearest.setting in str(refusal)
        if ("torch", task) != ("torch", "scientific") or hardware != "mps":
            assert nearest.hardware == hardware, (hardware, framework, task)


def test_torch_answers_everywhere_but_for_float64_on_apple_gpus() -> None:
    """PyTorch is what others fall back to, so only hardware can refuse it."""
    refused = [q for q in REFUSALS if q[1] in {"torch", "lightning"}]

    assert refused == [("mps", f, "scientific") for f in ("torch", "lightning")]


def test_refusals_say_which_of_three_things_is_missing() -> None:
    """A device, the framework's purpose, or float64, each with its page."""
    said = {
        ("a100", "transformer-engine", "pretrain"): ("GPUs with FP8, not on", "fp8"),
        ("mi300x", "transformer-engine", "rl"): ("runs on NVIDIA's GPUs", "fp8"),
        ("cpu", "megatron", "pretrain"): ("runs on CUDA, not on", "precision_names"),
        ("h100", "nemo-rl", "pretrain"): ("not made for pretrain", "precision_names"),
        ("h100", "accelerate", "scientific"): ("no name for float64", "double"),
        ("mps", "nemo", "scientific"): ("Apple GPU (MPS) has no float64", "double"),
    }
    for question, (text, page) in said.items():
        why = REFUSALS[question].why
        assert text in why.text
        assert page in why.page


EXPECTED = """
h100   lightning           pretrain   bf16-mixed
a100   torch               lora       torch.autocast(device, torch.bfloat16)
t4     lightning           finetune   16-mixed
t4     nemo-rl             rl         float32
t4     nemo-rl-megatron    rl         float16
v100   megatron-bridge     pretrain   fp16_mixed
v100   nemo                inference  fp16-true
l40s   transformer-engine  finetune   Float8CurrentScaling
h200   transformer-engine  inference  Float8CurrentScaling
b200   transformer-engine  pretrain   MXFP8BlockScaling
rtx-5090 transformer-engine pretrain  Float8CurrentScaling
mi300x lightning-fsdp      pretrain   bf16-mixed
mi300x deepspeed           rl         bf16
mps    lightning           speech     16-mixed
cpu    nemo                speech     32-true
cpu    torch               pretrain   model.to(torch.float32)
cpu    lightning           scientific 64-true
"""


@pytest.mark.parametrize("row", EXPECTED.strip().splitlines())
def test_the_answer_is_what_the_guides_say(row: str) -> None:
    """Written by hand, from the pages that each answer links."""
    hardware, framework, task, name = row.split(maxsplit=3)

    assert ANSWERS[hardware, framework, task].name == name


def test_alternatives_are_others_and_each_once() -> None:
    """No alternative is the answer, none is told twice."""
    for answer in ANSWERS.values():
        names = [answer.name, *(other.name for other in answer.alternatives)]
        assert len(set(names)) == len(names)
    fp8_or_less = {"bf16_with_fp8_current_scaling_mixed", "bf16_with_mxfp8_mixed"}
    fp8_or_less |= {"bf16_with_nvfp4_mixed"}
    others = ANSWERS["b200", "megatron-bridge", "pretrain"].alternatives
    assert {other.name for other in others} == fp8_or_less
    others = ANSWERS["h100", "lightning", "lora"].alternatives
    assert "nf4" in {other.name for other in others}


def test_every_row_of_the_rules_is_used() -> None:
    """A rule, an alternative or a warning that nothing reaches is a mistake."""
    used = {answer.why for answer in ANSWERS.values()}
    for answer in ANSWERS.values():
        used |= {*answer.warnings, *(other.why for other in answer.alternatives)}
    for table in ("_RULES", "_ALTERNATIVES", "_WARNINGS"):
        for *_, text, page in choose_a_precision._rows(
            getattr(choose_a_precision, table)
        ):
            assert choose_a_precision.Note(text, page) in used, text


def test_every_page_that_explains_is_there() -> None:
    """A note names a page of the guide, and its words start small and end bare."""
    notes = {answer.why for answer in ANSWERS.values()}
    notes |= {refusal.why for refusal in REFUSALS.values()}
    for answer in ANSWERS.values():
        notes |= {*answer.warnings, *(other.why for other in answer.alternatives)}
    for note in notes:
        assert (ROOT / f"source/{note.page}.md").is_file(), note
        assert not note.text.endswith((".", "\\"))


# --------------------------------------------------------- names, as precision_names


def test_frameworks_are_those_of_precision_names() -> None:
    """The same keys in the same order, and the same words around a name."""
    theirs = {k: row.setting for k, row in precision_names.FRAMEWORKS.items()}

    assert theirs == FRAMEWORKS
    assert list(theirs) == list(FRAMEWORKS)


def test_every_name_is_known_to_precision_names() -> None:
    """It is one of the framework's names, and means the same in all six fields."""
    for _, framework, one in settings():
        rows = precision_names.lookup(one.name, framework)
        meant = [row for row in rows if row.name == one.name]
        assert meant, (framework, one.name)
        assert precision_names.Precision(**one.precision) == meant[0].precision
        assert one.setting == str(meant[0])


def test_what_pytorch_is_told_is_a_call() -> None:
    """Nothing that leaves a reader to guess what to write, as ``model`` alone."""
    told = {one.setting for _, framework, one in settings() if framework == "torch"}

    assert "model.to(torch.float32)" in told
    for setting in told:
        tree = ast.parse(setting, mode="eval").body
        calls = [tree.left, tree.right] if isinstance(tree, ast.BinOp) else [tree]
        assert all(isinstance(call, ast.Call) for call in calls), setting


def allows(needs: str, hardware: str) -> bool:
    """Say whether a device is among those that precision_names gives."""
    device = HARDWARE[hardware]
    number = float(device.capability or 0)
    if found := re.fullmatch(r"sm(\d+)(\d)(, .+)?", needs):
        fits = number >= float(f"{found[1]}.{found[2]}")
        return fits and not ("not sm120" in needs and number >= 12)
    return {
        "any": True,
        "any but MPS": hardware != "mps",
        "any GPU": hardware != "cpu",
        "CUDA": bool(device.has & {"cuda", "rocm"}),  # ROCm's PyTorch calls it cuda
        "CUDA, MPS": hardware != "cpu",
    }[needs]


def test_no_name_needs_more_than_the_device_has() -> None:
    """The hardware that precision_names gives for a name includes the device."""
    for hardware, framework, one in settings():
        for row in precision_names.lookup(one.name, framework):
            assert allows(row.hardware, hardware), (hardware, framework, one.name)


def test_nf4_is_a_mode_of_the_quantized_layers() -> None:
    """The name is theirs, and so are the 4.5 bits."""
    layer = quantized_linear.QuantizedLinear.from_linear(
        nn.Linear(1024, 64, bias=False), mode="nf4"
    )
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    codebook = 16 * 4

    assert "nf4" in quantized_linear.CODEBOOKS
    others = ANSWERS["h100", "torch", "inference"].alternatives
    [nf4] = [other for other in others if other.name == "nf4"]
    bits = nf4.bytes_per_parameter[0] * 8
    assert (held - codebook) * 8 / (1024 * 64) <= bits == 4.5


# --------------------------------------------------------- devices


@pytest.mark.parametrize("key", [k for k, d in HARDWARE.items() if d.capability])
def test_a_gpu_has_what_transformer_engine_finds_on_its_capability(key: str) -> None:
    """FP8, its blocks and MXFP8 by TE's own conditions, run on the emulator.

    TE says that NVFP4 is there on 12.0, and documents training for 10.0 and 10.3.
    """
    device = HARDWARE[key]
    major, minor = map(int, str(device.capability).split("."))
    with fp8.emulated_device((major, minor)):
        found = {
            "fp8": fp8.is_fp8_available(),
            "blocks": fp8.is_fp8_block_scaling_available(),
            "mx": fp8.is_mxfp8_available(),
            "fp4": fp8.is_nvfp4_available() and major < 12,
        }
    found |= {"bf16": major >= 8, "tf32": major >= 8, "old": major < 8, "fp64": True}
    found |= {"no-mx": major >= 12, "cuda": True, "gpu": True}
    found["slow64"] = (major, minor) in {(7, 5), (8, 6), (8, 9), (12, 0)}

    assert device.has == {word for word, is_there in found.items() if is_there}


def test_16_bits_are_what_the_device_computes_in() -> None:
    """Nothing trains in BF16 without BF16, in FP16 with it, in either on a CPU."""
    for (hardware, framework, task), answer in ANSWERS.items():
        compute = answer.precision["compute"]
        has = HARDWARE[hardware].has
        if task == "scientific":
            assert compute == "float64"
        elif hardware == "cpu":
            assert compute == "float32"
        elif "bf16" not in has:
            gives_up = hardware in {"t4", "v100"} and framework == "nemo-rl"
            assert compute == ("float32" if gives_up else "float16")
        else:
            assert compute == "bfloat16" or framework == "transformer-engine"


def test_what_trains_in_fp16_is_scaled_and_stepped_in_float32() -> None:
    """No recommended training stores what it updates in 16 bits alone."""
    for (_, _, task), answer in ANSWERS.items():
        fields = answer.precision
        if task in TRAIN and "yours" not in fields.values():
            assert (fields["scaler"] != "none") == (fields["compute"] == "float16")
            assert "float32" in {fields["storage"], fields["main_params"]}


# --------------------------------------------------------- bytes

N = 4 * 256 * 256


def measured(
    storage: torch.dtype, half: torch.dtype | None = None, main: str | None = None
) -> list[int]:
    """Run a step of linear layers and return the most that is held of each kind."""
    layers = [nn.Linear(256, 256, bias=False, dtype=storage) for _ in range(4)]
    model = nn.Sequential(*layers)
    optimizer: Any = AdamW(model.parameters())
    if main is not None:
        grad_dtype = FP32 if main == "gradients in float32" else None
        optimizer = MainParams(optimizer, grad_dtype=grad_dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=half == FP16)
    with MemoryLedger(model, optimizer) as ledger:
        with torch.autocast("cpu", half) if half else nullcontext():
            loss = model(torch.randn(1, 256, dtype=storage)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    return held(ledger, 4)


def held(ledger: MemoryLedger, tensors: int) -> list[int]:
    """Return the most of each kind; AdamW's counters of steps are no state here."""
    names = ("parameters", *KINDS[1:])
    most = [max(m.get(name, 0) for m in ledger.moments.values()) for name in names]
    most[3] -= 4 * tensors if most[3] else 0
    return most


MEASURED = {
    ("h100", "torch", "pretrain"): lambda: measured(FP32, BF16),
    ("t4", "torch", "pretrain"): lambda: measured(FP32, FP16),
    ("cpu", "torch", "pretrain"): lambda: measured(FP32),
    ("h100", "megatron", "pretrain"): lambda: measured(
        BF16, main="gradients in float32"
    ),
    ("t4", "megatron", "pretrain"): lambda: measured(FP16, main=""),
    ("h100", "nemo-rl-megatron", "rl"): lambda: measured(BF16, main=""),
}


@pytest.mark.parametrize("question", MEASURED, ids="-".join)
def test_bytes_are_what_the_ledger_measures(question: tuple[str, str, str]) -> None:
    """Each kind, to the byte, on a small model that is really trained."""
    answer = ask(*question, parameters=N)
    assert isinstance(answer, Recommendation)

    assert list(answer.memory.values()) == MEASURED[question]()
    assert tuple(answer.memory) == KINDS


@pytest.mark.parametrize(
    ("name", "storage"), [("bf16-true", BF16), ("64-true", FP64), ("32-true", FP32)]
)
def test_bytes_of_one_dtype_are_what_the_ledger_measures(
    name: str, storage: torch.dtype
) -> None:
    """The alternatives that store everything as they compute, training."""
    key = {"bf16-true": "bf16", "64-true": "fp64", "32-true": "fp32"}[name]
    each = choose_a_precision._bytes(key, "pretrain")

    assert [size * N for size in each] == measured(storage)


def test_lora_in_16_bits_is_what_the_ledger_measures() -> None:
    """Frozen weights in BF16, adapters in float32, under autocast."""
    frozen = nn.Linear(1000, 1000, bias=False, dtype=BF16).requires_grad_(False)
    down, up = nn.Linear(1000, 5, bias=False), nn.Linear(5, 1000, bias=False)
    model = nn.ModuleList([frozen, down, up])
    optimizer = AdamW([*down.parameters(), *up.parameters()])
    with MemoryLedger(model, optimizer) as ledger:
        with torch.autocast("cpu", BF16):
            x = torch.randn(1, 1000)
            loss = (frozen(x) + up(down(x))).sum()
        loss.backward()
        optimizer.step()
    answer = ask("a100", "torch", "lora", 1e6)
    assert isinstance(answer, Recommendation)

    adapters = 2 * 5 * 1000
    assert adapters == 1e6 * ADAPTERS
    assert list(answer.memory.values()) == held(ledger, 2)


def test_inference_holds_weights_and_their_casts_alone() -> None:
    """2 bytes in BF16; a framework that only autocasts holds 4, and 2 for the cast."""
    for framework, wanted in (
        ("torch", [2, 0, 0, 0, 0]),
        ("accelerate", [4, 0, 0, 0, 2]),
    ):
        answer = ANSWERS["h100", framework, "inference"]
        assert list(answer.bytes_per_parameter) == wanted
    model = nn.Linear(256, 256, bias=False, dtype=BF16)
    with MemoryLedger(model) as ledger, torch.no_grad():
        model(torch.ones(1, 256, dtype=BF16))
    assert held(ledger, 1) == [2 * 256 * 256, 0, 0, 0, 0]


def test_bytes_are_those_of_the_ledgers_page() -> None:
    """Every mode of its table that is a precision here has the sum that stands there.

    For FP8 with main params as well, which it could not measure.
    """
    page = (ROOT / "source/guide/memory_ledger.md").read_text("utf-8")
    rows = re.findall(r"(?m)^([\w, -]+?) +((?:\d+ +){6})[\d.]+  \w", page)
    table = {name: [int(n) for n in cells.split()] for name, cells in rows}
    keys = {
        "32-true": "fp32",
        "16-mixed": "amp-fp16",
        "bf16-mixed": "amp-bf16",
        "16-true": "fp16",
        "bf16-true": "bf16",
        "64-true": "fp64",
        "16, main": "mcore-fp16",
        "bf16, main": "mcore-bf16",
        "fp8, main": "mcore-fp8",
    }

    assert set(table) == set(keys)
    for name, key in keys.items():
        each = choose_a_precision._bytes(key, "pretrain")
        assert [*each, sum(each)] == table[name], name


def test_memory_is_proportional_and_whole() -> None:
    """The parameters scale it, and change nothing but it and the last warning."""
    small, large = (ask("h100", "lightning", "pretrain", n) for n in (1e6, 1e12))
    assert isinstance(small, Recommendation)
    assert isinstance(large, Recommendation)

    assert [10**6 * n for n in small.memory.values()] == list(large.memory.values())
    assert all(isinstance(n, int) for n in large.memory.values())
    assert large.warnings[:-1] == small.warnings
    assert large.warnings[-1].page == "guide/memory_ledger"
    assert f"at least {18e12 / 80e9:.0f}," in large.warnings[-1].text
    assert (small.name, small.alternatives) == (large.name, large.alternatives)


def test_devices_are_counted_up_from_the_first_byte_too_many() -> None:
    """80 GB fit into 80 GB; where the memory is not known there is no warning."""
    assert devices_needed(80 * 10**9, "h100") == 1
    assert devices_needed(80 * 10**9 + 1, "h100") == 2
    assert devices_needed(10**15, "cpu") == devices_needed(10**15, "mps") == 1
    exactly = 80e9 / 18
    assert not any(
        note.page == "guide/memory_ledger"
        for note in recommend("h100", "torch", math.floor(exactly)).warnings
    )
    more = recommend("h100", "torch", math.ceil(exactly) + 1).warnings[-1]
    assert "shard over at least 2," in more.text


def test_bytes_are_written_in_the_largest_unit_below_them() -> None:
    """One decimal, ties up, as the chooser's script does."""
    cases = {0: "0.0 B", 1: "1.0 B", 1023: "1023.0 B", 1024: "1.0 KiB"}
    cases |= {1280: "1.3 KiB", 2**20 - 1: "1024.0 KiB", 2**20: "1.0 MiB"}
    cases |= {2**30: "1.0 GiB", 5 * 2**28: "1.3 GiB", 2**50: "1048576.0 GiB"}

    assert {n: written(n) for n in cases} == cases


def test_the_text_says_all_that_the_fields_say() -> None:
    """Setting, reason and its page, memory, warnings, alternatives: a line each."""
    answer = ANSWERS["h100", "lightning", "pretrain"]
    lines = str(answer).splitlines()

    assert lines[0] == 'precision="bf16-mixed"'
    assert lines[1] == f"  because {answer.why.text} ({answer.why.page})"
    assert lines[2].startswith("  holds 117.3 GiB: 26.1 GiB weights, 26.1 GiB grad")
    assert len(lines) == 3 + len(answer.warnings) + len(answer.alternatives)


def test_an_answer_can_be_changed_without_changing_the_next() -> None:
    """What is handed out is the caller's."""
    recommend().precision["storage"] = "float8"
    recommend().alternatives[0].precision["storage"] = "float8"

    assert recommend().precision["storage"] == "float32"
    assert recommend().alternatives[0].precision["storage"] == "bfloat16"


# --------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hardware": "H100"}, r"hardware must be .*; got 'H100'; nearest: 'h100'"),
        ({"hardware": "rtx4090"}, r"got 'rtx4090'; nearest: 'rtx-4090'"),
        ({"framework": "ligthning"}, r"got 'ligthning'; nearest: 'lightning'"),
        ({"task": "pretraining"}, r"task must be .*nearest: 'pretrain'"),
        ({"hardware": None}, r"hardware must be .*got None"),
        ({"hardware": ["h100"]}, r"hardware must be .*got \['h100'\]"),
        ({"parameters": 0}, r"parameters must be from 1 to 1e15, got 0"),
        ({"parameters": -7e9}, r"got -7000000000.0"),
        ({"parameters": math.nan}, r"got nan"),
        ({"parameters": math.inf}, r"got inf"),
    ],
)
def test_words_and_numbers_that_make_no_sense_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    """The message has what was given, what is allowed, and the nearest words."""
    with pytest.raises(ValueError, match=message) as caught:
        recommend(**arguments)
    assert not isinstance(caught.value, NoRecommendation)


@pytest.mark.parametrize("parameters", ["7e9", True, None, 7 + 0j])
def test_parameters_are_a_number(parameters: float) -> None:
    """A text such as "7B" is not read, and True is not 1."""
    with pytest.raises(TypeError, match="parameters must be a number such as 7e9"):
        recommend("h100", "torch", parameters)
