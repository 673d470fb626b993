"""The laws that background/why_fp8_works states, and the record that it draws."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import fp8_training
from snippets import fp8

FORMATS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
SCALED = ("delayed", "current", "blockwise", "MXFP8")


def in_fp8(x: Tensor, name: str) -> Tensor:
    """Return ``x`` quantized by its own amax and back."""
    largest = torch.finfo(FORMATS[name]).max
    scale = fp8.compute_current_scale(x.abs().amax(), largest)
    return fp8.dequantize(*fp8.quantize_tensor(x, name, scale))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Return what the benchmark recorded."""
    text = fp8_training.RECORD.read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


# The laws


@pytest.mark.parametrize("name", FORMATS)
def test_scaled_fp8_is_off_by_at_most_half_a_step(name: str) -> None:
    """``|fl(x) - x| <= 2^-(p+1) |x|`` in the normal range, and ties reach it."""
    info = torch.finfo(FORMATS[name])
    p = -round(math.log2(info.eps))
    low = math.log2(info.smallest_normal)
    powers = torch.empty(500_000).uniform_(low, math.log2(info.max))
    x = torch.exp2(powers).clamp(info.smallest_normal, info.max)
    codes, inv_scale = fp8.quantize_tensor(x, name, 1.0)
    error = (fp8.dequantize(codes, inv_scale) - x).abs() / x

    assert error.max() <= 2.0 ** -(p + 1)
    tie = torch.tensor([1 + 2.0 ** -(p + 1)])
    assert abs(fp8.quantize_tensor(tie, name, 1.0)[0].float() - tie) == 2.0 ** -(p + 1)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_of_a_product_add_like_random_numbers(name: str) -> None:
    """Sums of random signs are off by ``sqrt(2) sigma sqrt(sum x^2 w^2)``.

    Sums of one row share its errors, so the mean square over n rows has a relative
    deviation of ``sqrt(2 / n)`` at most, of which three are allowed; ``sigma^2 / 2`` is
    the product of both errors, which the law leaves out.
    """
    torch.manual_seed(0)
    rows, terms = 128, 1024
    x, w = torch.randn(rows, terms), torch.randn(rows, terms)
    qx, qw = in_fp8(x, name), in_fp8(w, name)
    sigma = ((qx - x).norm() / x.norm()).item()
    error = (qx.double() @ qw.double().T - x.double() @ w.double().T).square()
    law = 2 * sigma**2 * (x.double().square() @ w.double().square().T)
    ratio = (error.sum() / law.sum()).item()

    assert abs(ratio - 1) <= 3 * math.sqrt(2 / rows) + sigma**2 / 2


def test_of_one_sign_a_bias_is_left_and_e4m3_has_the_smaller() -> None:
    """Magnitudes are rounded down a little more often: their density falls."""
    torch.manual_seed(0)
    x = torch.randn(1_000_000).abs()
    bias = {name: ((in_fp8(x, name) - x).mean() / x.mean()).item() for name in FORMATS}

    assert -(2**-10) < bias["E4M3"] < 0
    assert -(2**-8) < bias["E5M2"] < 2 * bias["E4M3"]


@pytest.mark.parametrize("name", FORMATS)
def test_one_scale_is_enough_down_to_the_smallest_normal_number(name: str) -> None:
    """Beside an outlier precision holds for ``|x| >= amax xmin / xmax``, not below."""
    info = torch.finfo(FORMATS[name])
    p = -round(math.log2(info.eps))
    bound = info.smallest_normal / info.max
    near = torch.linspace(1.001, 1.999, 1000) * bound
    x = torch.cat([torch.ones(1), near, near / 2**p])
    error = ((in_fp8(x, name) - x).abs() / x)[1:]

    # The scale, its inverse and both products are rounded to float32, too.
    assert error[:1000].max() <= 2.0 ** -(p + 1) + 2.0**-21
    assert error[1000:].max() > 2 * 2.0 ** -(p + 1)


@pytest.mark.parametrize(("name", "least"), [("E4M3", 27 / 28), ("E5M2", 13 / 14)])
def test_what_is_close_to_amax_becomes_amax(name: str, least: float) -> None:
    """The number next to amax is a 14th smaller in E4M3, a 7th in E5M2."""
    parts = torch.tensor([least - 1e-4, least + 1e-4])
    for amax in (0.3, 1.0, 236.0):
        x = torch.cat([torch.ones(1), parts]) * amax
        codes = in_fp8(x, name)

        assert codes[2] == codes[0]
        assert codes[1] / codes[0] == pytest.approx(2 * least - 1)


def test_an_update_below_half_a_step_is_lost_in_e4m3() -> None:
    """A weight in E4M3 is moved by more than half of its step, and by nothing less."""
    codes = torch.arange(0x09, 0x7E, dtype=torch.uint8)  # normal, and a step above it
    w = codes.view(torch.float8_e4m3fn).float()
    step = torch.exp2(torch.frexp(w)[1] - 4)  # 2^(floor(log2 w) - p), p = 3
    for fraction, moves in ((0.49, False), (0.51, True)):
        moved = fp8.quantize_tensor(w + fraction * step, "E4M3", 1.0)[0].float() != w

        assert bool(moved.all()) is moves
        assert bool(moved.any()) is moves


def test_two_dimensional_blocks_make_one_weight_for_both_passes() -> None:
    """16 x 16 blocks of the transpose hold the same numbers; rows of 16 do not."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def both(two_d: bool) -> tuple[Tensor, Tensor]:
        forward = fp8.dequantize(*fp8.quantize_nvfp4(w, two_d=two_d))
        backward = fp8.dequantize(*fp8.quantize_nvfp4(w.T.contiguous(), two_d=two_d))
        return forward, backward.T

    assert torch.equal(*both(two_d=True))
    assert not torch.equal(*both(two_d=False))


def test_what_no_average_removes_was_cut_off() -> None:
    """The mean of n draws is as far off as ``1/sqrt(n)`` says, but for what exceeds 6.

    What a block's rounded scale takes beyond the largest code is cut off in each draw.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 512, generator=generator)
    draws = 256
    total = torch.zeros_like(x)
    for n in range(draws):
        made = fp8.quantize_nvfp4(x, stochastic=True, generator=generator)
        total += fp8.dequantize(*made)
        if n == 0:
            first = total - x
            _, scale, amax = made
    error = total / draws - x
    codes = x.view(32, -1, 16) / (scale.float() * amax / 2688)[..., None]
    cut = codes.view(x.shape).abs() > 6

    root = (error[~cut].norm() / first[~cut].norm()).item() * math.sqrt(draws)
    assert abs(root - 1) < 0.05  # 5 / sqrt of the elements, and 1/256 of random bits
    assert error[cut].norm() > error[~cut].norm()


# The record


def test_the_benchmark_still_trains_as_recorded(record: dict[str, Any]) -> None:
    """The first losses of two runs, within what BF16 leaves to the order of sums."""
    for name in ("FP32", "current"):
        losses, _ = fp8_training.train(fp8_training.runs()[name], 0, 4)
        for loss, recorded in zip(losses, record["runs"][name]["first"], strict=False):
            assert abs(loss / recorded - 1) < 2**-8


@pytest.mark.parametrize("residual", [False, True])
def test_a_state_beside_the_product_is_the_same_function(residual: bool) -> None:
    """Both recurrent networks start from equal weights and return equal scores."""
    torch.manual_seed(0)
    model = fp8_training.Recurrent(residual)
    ink = torch.arange(128.0).view(2, 64) % 17
    torch.manual_seed(0)
    expected = fp8_training.Recurrent(False)(ink)

    assert torch.allclose(model(ink), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["pale scans", "recurrent"])
def test_the_tasks_are_still_learned_as_recorded(
    name: str, record: dict[str, Any]
) -> None:
    """The first point of a curve, within what BF16 leaves to the order of sums."""
    task, run = fp8_training.TASKS[name], fp8_training.runs()["current"]
    losses, right = fp8_training.learn(task, run, 0, fp8_training.POINT)
    recorded = record[name]["runs"]["current"]["seeds"][0][0]

    assert abs(sum(losses) / len(losses) / recorded - 1) < 2**-7
    assert all(0 <= part <= 1 for part in right)


def test_e5m2_alone_fails_where_all_others_learn(record: dict[str, Any]) -> None:
    """On pale scans, in each seed; with the paper's gray taken off it does not."""
    pale, centered = record["pale scans"], record["pale scans, centered"]
    for name, run in pale["runs"].items():
        assert len(run["right"]) >= 3
        if name == "E5M2 only":
            assert max(run["right"]) < 20
            assert all(min(curve) > math.log(10) - 0.05 for curve in run["seeds"])
        else:
            assert min(run["right"]) > 97
        assert min(centered["runs"][name]["right"]) > 99


def test_e5m2_alone_loses_a_running_sum(record: dict[str, Any]) -> None:
    """More than twice what FP8 loses; beside the product a few percent."""
    through, beside = (record[f"recurrent{end}"]["runs"] for end in ("", ", residual"))
    for e5m2, current in zip(
        through["E5M2 only"]["percent"], through["current"]["percent"], strict=True
    ):
        assert e5m2 > max(20, 2 * current)
    for name in ("current", "E5M2 only"):
        assert max(beside[name]["percent"]) < 7


def test_the_record_is_complete(record: dict[str, Any]) -> None:
    """Each run that the benchmark makes, with curves as long as their axis."""
    for name, task in fp8_training.TASKS.items():
        assert list(record[name]["runs"]) == list(task.recipes)
        assert record[name]["steps"][-1] == task.steps
        for run in record[name]["runs"].values():
            assert {len(curve) for curve in run["seeds"]} == {
                len(record[name]["steps"])
            }
    assert list(record["runs"]) == list(fp8_training.runs())
    for run in record["runs"].values():
        assert {len(curve) for curve in run["seeds"]} == {len(record["steps"])}
        assert len(run["more"]) == len(record["steps"])
        assert len(run["first"]) == fp8_training.FIRST


def test_a_recorder_changes_nothing_and_counts_all() -> None:
    """Each number that is not zero is in the bin of its power of two."""
    counts = torch.zeros(4, dtype=torch.long)
    x = torch.tensor([[0.0, 1.0, 1.9, -2.0, 1e-9, 1e9]])
    out = fp8_training.Recorder(counts, -1).quantize(x)

    assert torch.equal(out.dequantize(), x)
    assert counts.tolist() == [1, 2, 1, 1]


def test_adding_a_run_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]
) -> None:
    """In the order of the benchmark, compared with FP32 seed by seed."""
    monkeypatch.setattr(fp8_training, "RECORD", tmp_path / "record.json")
    made = copy.deepcopy(record["runs"])
    wanted = list(made["current"]["percent"])
    fp8_training.add({"current": made["current"]}, {})
    found = fp8_training.add({"FP32": made["FP32"]}, {"outliers": {"powers": [0]}})

    assert list(found["runs"]) == ["FP32", "current"]
    assert found["runs"]["FP32"]["percent"] == [0.0, 0.0, 0.0]
    assert found["runs"]["current"]["percent"] == wanted
    assert json.loads((tmp_path / "record.json").read_text()) == found
