"""Tests of snippets/find_first_bad_module, as read in its guide."""

import copy
import json
import logging
import math
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from snippets import fp8
from snippets.find_first_bad_module import (
    BadModule,
    FirstBadModule,
    TensorRange,
    find_first_bad_module,
)
from tests.quiet import quiet_import
from tests.ranks import needs_gloo, run_ranks

WIDTH, ROWS, DEPTH = 8, 4, 6
INF = math.inf


class Fault(nn.Module):
    """Passes values on; its operation makes NaN or Inf in forward or in backward."""

    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Do the operation on the first column."""
        first, rest = x[:, :1], x[:, 1:]
        match self.kind:
            case "sqrt of a negative":
                first = (-first.square() - 1).sqrt()
            case "log of zero":
                first = (first * 0).log()
            case "zero by zero":
                first = (first * 0) / (first * 0)
            case "exp":
                first = first.square().add(100).exp()
            case "half":
                first = first.square().add(7e4).half().float()
            case "backward of sqrt":
                first = (first * 0).sqrt()
            case "backward of norm":
                first = (first * 0).square().sum(-1, keepdim=True).pow(0.5)
            case "backward of a function":
                first = BadBackward.apply(first)  # type: ignore[no-untyped-call]
            case "backward of a product":
                first = (first * 0) * 1e30 * 1e30
        return torch.cat([first, rest], -1)


class BadBackward(torch.autograd.Function):
    """The identity, whose backward divides by zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        """Return the same values."""
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        """Divide by zero."""
        return grads[0] / grads[0].mul(0)


FORWARD = {
    "sqrt of a negative": "aten.sqrt",
    "log of zero": "aten.log",
    "zero by zero": "aten.div",
    "exp": "aten.exp",
    "half": "aten._to_copy",
}
BACKWARD = {
    "backward of sqrt": ("aten.div", "aten.sqrt"),
    "backward of norm": ("aten.pow", "aten.pow"),
    "backward of a function": ("aten.div", "aten.clone"),
    "backward of a product": ("aten.mul", "aten.mul"),
}


def chain(*faults: str) -> nn.Sequential:
    """Make blocks of Linear, Tanh and a fault."""
    torch.manual_seed(0)
    layers = []
    for fault in faults:
        parts = {"fc": nn.Linear(WIDTH, WIDTH), "act": nn.Tanh(), "odd": Fault(fault)}
        block = nn.Sequential()
        for name, part in parts.items():
            block.add_module(name, part)
        layers.append(block)
    return nn.Sequential(*layers)


def batch() -> Tensor:
    """Make a batch."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def found(result: BadModule | None) -> BadModule:
    """Insist on a finding."""
    assert result is not None
    return result


# What is named


@pytest.mark.parametrize("fault", FORWARD)
def test_planted_forward_faults_are_named(fault: str) -> None:
    """At any depth: the module, its operation, and the line in its forward."""
    for at in range(DEPTH):
        model = chain(*("none",) * at, fault, *("none",) * (DEPTH - at - 1))

        result = found(find_first_bad_module(model, batch(), loss_fn=torch.sum))

        assert (result.module, result.module_type) == (f"{at}.odd", "Fault")
        assert (result.phase, result.operation) == ("forward", FORWARD[fault])
        assert not any(r.nan + r.posinf + r.neginf for r in result.inputs)
        assert result.output.nan + result.output.posinf + result.output.neginf == ROWS
        assert f"{Path(__file__).name}:" in result.line
        assert " in forward: first = " in result.line


@pytest.mark.parametrize("fault", BACKWARD)
def test_planted_backward_faults_are_named(fault: str) -> None:
    """The module whose operation is differentiated, both operations, the line."""
    for at in range(1, DEPTH):
        model = chain(*("none",) * at, fault, *("none",) * (DEPTH - at - 1))
        assert find_first_bad_module(model, batch()) is None

        result = found(find_first_bad_module(model, batch(), loss_fn=torch.sum))

        assert (result.module, result.phase) == (f"{at}.odd", "backward")
        assert (result.operation, result.backward_of) == BACKWARD[fault]
        assert "test_find_first_bad_module.py" in result.line


def test_of_two_faults_the_first_is_named() -> None:
    """In forward the one that comes first, in backward the one reached first."""
    forward = chain("none", "exp", "none", "log of zero")
    both = chain("backward of sqrt", "none", "backward of sqrt")
    mixed = chain("backward of sqrt", "none", "log of zero")

    names = [
        found(find_first_bad_module(m, batch(), loss_fn=torch.sum)).module
        for m in (forward, both, mixed)
    ]

    assert names == ["1.odd", "2.odd", "2.odd"]


def test_ranges_are_those_of_the_operation() -> None:
    """Counts, extremes, dtype and shape, before an in-place operation wrote there."""
    x = torch.tensor([1.0, -4.0, 9.0])
    with FirstBadModule() as block:
        y = x.clone()
        y.sqrt_()
    result = found(block.result)

    assert result.operation == "aten.sqrt_"
    assert result.inputs == (TensorRange(torch.float32, (3,), -4.0, 9.0),)
    assert result.output == TensorRange(torch.float32, (3,), 1.0, 3.0, nan=1)
    assert str(result.output) == "float32 [3] 1 to 3, 1 NaN"


def test_code_without_modules_is_named_by_operation_and_line() -> None:
    """No model: the operation and the line of this file."""
    weight = nn.Parameter(torch.zeros(3))
    with FirstBadModule() as block:
        loss = weight.square().sum().sqrt()  # the line
        torch.autograd.backward(loss)
    result = found(block.result)

    assert (result.module, result.phase) == ("(outside)", "backward")
    assert result.line.endswith("loss = weight.square().sum().sqrt()  # the line")
    assert bool(block)
    assert str(block) == str(result) == result.message
    assert "no loss scale cures it" in result.message


def test_half_precision_overflow_tells_the_wider_result() -> None:
    """Under autocast: which module, and that float32 would hold it."""
    model = chain(*["none"] * 3)
    big = model.get_submodule("2.fc").weight
    with torch.no_grad():
        assert isinstance(big, Tensor)
        big.fill_(6e4)
        model.get_submodule("2").act = nn.ReLU()  # tanh would make 1 of Inf
        model.get_submodule("1.fc").bias.fill_(5.0)  # type: ignore[operator]

    with torch.autocast("cpu", torch.float16):
        result = found(find_first_bad_module(model, batch() + 3, loss_fn=torch.sum))
    assert (result.module, result.operation) == ("2.fc", "aten.addmm")
    assert result.output.dtype == torch.float16
    assert result.in_wider_dtype is not None
    assert 65504 < result.in_wider_dtype < INF
    assert "float16 ends at 65504, in float32 the largest is" in result.message
    assert find_first_bad_module(model, batch() + 3, loss_fn=torch.sum) is None


@pytest.mark.parametrize(
    ("target", "end"),
    [
        (0.0, "float16 ends at 65504, in float32 the largest is 2.5e+11; "
              "a loss scale 4194304 times lower cures it; "),
        (1.0, "in float32 it is finite, at most 0; "),
    ],
)  # fmt: skip
def test_where_no_scale_can_help_the_message_tells(target: float, end: str) -> None:
    """BCE of a saturated sigmoid divides by 1e-12, or by what float16 makes of it."""
    model = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()).half()
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(30.0)

    def loss_fn(p: Tensor) -> Tensor:
        return F.binary_cross_entropy(p, torch.full_like(p, target))

    x = torch.ones(4, 4).half()
    result = found(find_first_bad_module(model, x, loss_fn=loss_fn))
    assert result.phase == "backward"
    assert end in result.message


def test_an_infinity_of_a_high_scale_is_no_nan_of_the_forward_pass() -> None:
    """Backward, overflow, a lower scale cures it; and it does. GradScaler skips."""
    model, x = chain(*["none"] * 3), batch()

    def loss_fn(y: Tensor) -> Tensor:
        return y.float().square().mean()

    with torch.autocast("cpu", torch.float16):
        high = found(find_first_bad_module(model, x, loss_fn=loss_fn, scale=2.0**20))
        low = find_first_bad_module(model, x, loss_fn=loss_fn, scale=2.0**10)
    assert (high.phase, high.output.nan) == ("backward", 0)
    assert high.output.dtype == torch.float16
    told = re.search(r"a loss scale (\d+) times lower cures it", high.message)
    assert told
    assert high.in_wider_dtype is not None
    factor = int(told[1])
    assert high.in_wider_dtype / factor <= 65504 < high.in_wider_dtype / factor * 2
    assert low is None

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with FirstBadModule(model) as block:
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(model(x))
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    assert (
        found(block.result).message.partition("called")[0]
        == (high.message.partition("called")[0])
    )
    assert scaler.get_scale() == 2.0**19


def test_a_forward_fault_under_a_scaler_is_a_forward_fault() -> None:
    """NaN of the forward pass is named there, whatever the scale does to gradients."""
    model = chain("none", "sqrt of a negative", "none")

    for scale in (1.0, 2.0**16, 2.0**40):
        with torch.autocast("cpu", torch.float16):
            result = found(
                find_first_bad_module(model, batch(), loss_fn=torch.sum, scale=scale)
            )
        assert (result.module, result.phase) == ("1.odd", "forward")


def test_what_was_bad_before_is_told_as_such() -> None:
    """The batch and its argument, parameters, buffers, gradients, targets."""
    bad = batch()
    bad[1, 2] = math.nan
    model = chain(*["none"] * 3)
    cases: list[tuple[BadModule | None, str, str]] = []
    cases.append((find_first_bad_module(model, bad), "input", "argument 0"))
    cases.append((find_first_bad_module(model, batch() - INF), "input", "argument 0"))
    named = find_first_bad_module(model, input=bad)
    cases.append((named, "input", "argument input"))
    target = find_first_bad_module(
        model, batch(), loss_fn=lambda y: F.mse_loss(y, bad, reduction="mean")
    )
    cases.append((target, "input", "a tensor"))
    norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).eval()
    assert isinstance(norm[1].running_mean, Tensor)
    norm[1].running_mean[0] = math.nan
    buffer = find_first_bad_module(norm, batch(), loss_fn=torch.sum)
    cases.append((buffer, "parameter", "1.running_mean"))
    model.get_parameter("2.fc.weight").data[0, 0] = INF
    weight = find_first_bad_module(model, batch(), loss_fn=torch.sum)
    cases.append((weight, "parameter", "2.fc.weight"))
    healthy = nn.Linear(WIDTH, 1)
    healthy.weight.grad = torch.full_like(healthy.weight, math.nan)
    with FirstBadModule(healthy) as block:
        healthy(batch()).sum().backward()
    cases.append((block.result, "parameter", "weight"))

    for result, phase, name in cases:
        assert (found(result).phase, found(result).operation) == (phase, name)
        assert "holds NaN or Inf" in str(result)
    messages = [str(result) for result, _, _ in cases]
    assert messages[0] == (
        "the input batch holds NaN or Inf: argument 0, float32 [4, 8] "
        f"{bad.nan_to_num(0).min():.4g} to {bad.nan_to_num(0).max():.4g}, 1 NaN"
    )
    assert "parameter 2.fc.weight holds" in messages[5]
    assert "the gradient, from before, of weight" in messages[6]


RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from snippets.find_first_bad_module import FirstBadModule

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)

class Fault(nn.Module):
    def forward(self, x):
        return x * 1e30 * 1e30 if rank else x

torch.manual_seed(0)
ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), Fault(), nn.Linear(4, 1)))
with FirstBadModule(ddp) as found:
    ddp(torch.randn(8, 4)).sum().backward()
dist.barrier()
print(json.dumps([found.result.module, found.result.phase, str(found)]), flush=True)
os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down
"""


@needs_gloo
def test_a_fault_of_another_rank_is_told_as_such(tmp_path: Path) -> None:
    """It comes with the sum of gradients, which no operation and no line writes."""
    outputs = run_ranks(RANK, tmp_path)
    told = [json.loads(output.splitlines()[-1]) for output in outputs]

    (_, phase, message), sick = told
    assert sick[:2] == ["module.1", "forward"]
    assert phase == "input"
    text = "a tensor from before the block or from another rank holds NaN or Inf: "
    assert message.startswith(text)
    assert message.endswith("read by aten.as_strided")


def test_a_bad_row_that_is_not_used_is_no_fault() -> None:
    """NaN in a row of a table is found only when the row is read."""
    table = nn.Embedding(10, 4)
    table.weight.data[7] = math.nan

    assert find_first_bad_module(table, torch.tensor([1, 2]), loss_fn=torch.sum) is None
    result = find_first_bad_module(table, torch.tensor([1, 7]), loss_fn=torch.sum)
    assert found(result).operation == "weight"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [INF, math.nan])
def test_running_statistics_that_were_bad_are_named(
    training: bool, value: float
) -> None:
    """In training they are not read, in eval x / sqrt(Inf) is 0: nobody sees them."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[1].get_buffer("running_var")[3] = value
    with FirstBadModule(model.train(training)) as block:
        torch.autograd.backward(model(batch()).sum())
    result = found(block.result)

    assert (result.module, result.phase) == ("1", "parameter")
    assert "buffer 1.running_var holds NaN or Inf" in result.message


def test_running_statistics_that_overflow_are_named() -> None:
    """The output and the gradients are finite, and eval mode is ruined for good."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(WIDTH))
    big = batch() * 1e25
    result = found(find_first_bad_module(model, big, loss_fn=torch.sum))

    assert model(big).isfinite().all()
    assert (result.module, result.operation) == ("1", "aten.native_batch_norm")
    assert (result.phase, result.output.posinf) == ("forward", WIDTH)
    assert result.inputs[0].high == big.max()
    assert "running statistics" in result.message
    assert (
        find_first_bad_module(nn.BatchNorm1d(WIDTH), batch(), loss_fn=torch.sum) is None
    )


def test_computing_again_in_a_wider_dtype_writes_to_nothing() -> None:
    """A batch norm that makes NaN moves its running statistics once."""
    kept = []
    for watched in (False, True):
        model = nn.BatchNorm1d(2, dtype=torch.float64)
        x = torch.arange(8).double().view(4, 2)
        x[:, 0] = 1.7e308  # whose sum is infinite
        with FirstBadModule(model) if watched else nullcontext():
            assert model(x).isnan().any()
        kept.append(model.get_buffer("running_mean")[1])

    assert kept[0] == kept[1] > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_nested_tensors_of_an_encoder_are_read(whole: bool) -> None:
    """In eval a padded batch takes the fast path, whose tensors are nested."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    pad[0, 3:] = True
    if not whole:
        x[1, 1, 1] = INF
    with torch.no_grad():
        result = find_first_bad_module(encoder, x, src_key_padding_mask=pad)

    assert (result is None) == whole
    assert whole or found(result).phase == "input"


def test_the_optimizers_step_is_watched() -> None:
    """Adam divides by an eps that is zero in float16; fused, it computes in float32."""
    outcomes = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 1)).half()
        optimizer = torch.optim.Adam(model.parameters(), **options)  # type: ignore[arg-type]
        with FirstBadModule(model) as block:
            (model(batch().half()).sum() * 1e-5).backward()
            optimizer.step()
        assert bool(block) != all(bool(p.isfinite().all()) for p in model.parameters())
        outcomes.append(block.result and (block.result.phase, block.result.module))

    assert outcomes == [("step", "0"), ("step", "0"), None]


def test_forward_after_a_backward_is_no_step_of_an_optimizer() -> None:
    """A second pass, and a module under no_grad as in an evaluation."""
    weight = nn.Parameter(torch.ones(2))
    with FirstBadModule() as second:
        torch.autograd.backward(weight.sum())
        torch.autograd.backward((weight - 2).log().sum())
    model = chain("none", "sqrt of a negative")
    with FirstBadModule(model) as evaluated:
        model[0](batch()).sum().backward()
        with torch.no_grad():
            model(batch())

    for block, operation in ((second, "aten.log"), (evaluated, "aten.sqrt")):
        result = found(block.result)
        assert (result.phase, result.operation) == ("forward", operation)


def test_an_operation_in_place_is_not_computed_again() -> None:
    """What it read is written over: only the ranges are known."""
    x = torch.zeros(2)
    with FirstBadModule() as block:
        x.log_()

    result = found(block.result)
    assert (result.operation, result.in_wider_dtype) == ("aten.log_", None)
    assert result.inputs[0].low == result.inputs[0].high == 0
    assert "float64" not in result.message


def test_each_tensor_of_a_list_is_looked_at() -> None:
    """As of the foreach operations of optimizers, which make one for each weight."""
    with FirstBadModule() as block:
        kept = torch._foreach_log([torch.ones(2), torch.zeros(2)])

    assert len(kept) == 2
    assert found(block.result).operation == "aten._foreach_log"


def test_a_value_stays_bad_while_a_part_of_it_is() -> None:
    """Half of a tensor is written over; to ask for another like it reads no value."""
    with FirstBadModule() as halved:
        y = torch.zeros(4).log()
        y[:2] = 1.0
        torch.autograd.backward(y.sum().requires_grad_())
    with FirstBadModule() as asked:
        y = torch.zeros(4).log()
        torch.zeros_like(y), y.new_zeros(2)

    assert found(halved.result).operation == "aten.log"
    assert found(asked.result).operation == "aten.log"


def test_a_fault_goes_before_an_infinity_on_purpose() -> None:
    """Also where the mask was there first."""
    with FirstBadModule() as block:
        mask = torch.full((2,), -INF)
        logits = torch.zeros(2).log() + mask
        torch.autograd.backward(logits.sum().requires_grad_())
    bias = nn.Linear(2, 2)
    bias.bias.data.fill_(-INF)

    assert found(block.result).operation == "aten.log"
    result = found(find_first_bad_module(bias, torch.ones(1, 2)))
    assert (result.phase, result.operation) == ("parameter", "bias")


def test_a_checkpointed_block_is_named_where_it_stands() -> None:
    """In forward at its first run, in backward by the operation of the first run."""
    for reentrant in (True, False):
        for fault, phase in (("exp", "forward"), ("backward of sqrt", "backward")):
            inner = chain("none", fault)

            class Wrapped(nn.Module):
                def __init__(self, body: nn.Module, reentrant: bool) -> None:
                    super().__init__()
                    self.first, self.body = nn.Linear(WIDTH, WIDTH), body
                    self.reentrant = reentrant

                def forward(self, x: Tensor) -> Any:  # noqa: ANN401
                    x = self.first(x)
                    return checkpoint(self.body, x, use_reentrant=self.reentrant)

            model = Wrapped(inner, reentrant)
            result = found(find_first_bad_module(model, batch(), loss_fn=torch.sum))

            assert (result.module, result.phase) == ("body.1.odd", phase)


def test_tied_weights_and_shared_modules_have_their_first_name() -> None:
    """A module that stands in two places is named as named_modules does."""
    shared = Fault("exp")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), shared, nn.Tanh(), shared)

    assert found(find_first_bad_module(model, batch())).module == "1"


def test_many_steps_give_the_first() -> None:
    """The step that fails is in the block with healthy ones, before and after."""
    model = chain("none", "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with FirstBadModule(model) as block:
        for step in range(4):
            x = batch()
            loss = model(x).square().mean()
            if step == 2:
                loss = loss * torch.zeros(()).log()
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    result = found(block.result)
    assert (result.operation, result.module) == ("aten.log", "(outside)")


# What is not named


class Attention(nn.Module):
    """Scores with a mask, written in one of the ways that models use."""

    def __init__(self, way: str, rows: str = "causal") -> None:
        super().__init__()
        self.way, self.qkv = way, nn.Linear(WIDTH, 3 * WIDTH)
        upper = torch.ones(ROWS, ROWS).triu(1).bool()
        if rows == "all":
            upper[1] = True
        self.register_buffer("upper", upper)
        self.register_buffer("minus", torch.zeros(ROWS, ROWS).masked_fill(upper, -INF))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the rows."""
        q, k, v = self.qkv(x).chunk(3, -1)
        upper, minus = self.get_buffer("upper"), self.get_buffer("minus")
        if self.way == "sdpa":
            out: Tensor = F.scaled_dot_product_attention(
                q[None], k[None], v[None], minus
            )
            return out[0]
        scores = q @ k.T
        match self.way:
            case "masked_fill":
                scores = scores.masked_fill(upper, -INF)
            case "buffer":
                scores = scores + minus
            case "where":
                scores = torch.where(upper, -INF, scores)
            case "triu":
                scores = scores + torch.full((ROWS, ROWS), -INF).triu(1)
            case "in place":
                scores = scores.clone().masked_fill_(upper, -INF)
            case "index":
                scores = scores.clone()
                scores[upper] = -INF
            case "float":
                scores = scores + torch.tensor(-INF).where(upper, torch.tensor(0.0))
        mixed: Tensor = scores.softmax(-1) @ v
        return mixed


WAYS = ["masked_fill", "buffer", "where", "triu", "in place", "index", "float", "sdpa"]


@pytest.mark.parametrize("way", WAYS)
def test_masks_of_minus_infinity_are_no_fault(way: str) -> None:
    """-Inf on purpose that softmax makes finite is not named, however written."""
    for context in (nullcontext(), torch.autocast("cpu", torch.float16)):
        with context, sdpa_kernel([SDPBackend.MATH]):
            assert find_first_bad_module(Attention(way), batch()) is None
            loss = find_first_bad_module(Attention(way), batch(), loss_fn=torch.sum)
            assert loss is None


@pytest.mark.parametrize("way", [w for w in WAYS if w not in {"triu", "sdpa"}])
def test_a_row_that_is_masked_whole_is_the_softmaxs_fault(way: str) -> None:
    """NaN made of -Inf on purpose: the operation that made it."""
    result = found(find_first_bad_module(Attention(way, "all"), batch()))

    assert (result.module_type, result.operation) == ("Attention", "aten._softmax")
    assert result.inputs[0].neginf >= ROWS
    assert "of the infinities of" in result.message


def test_an_infinity_on_purpose_is_a_fault_in_the_loss() -> None:
    """The label is masked: the loss is Inf; masked logits alone are an output."""
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    mask[:, 0] = True

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(mask, -INF)

    model = Masked(WIDTH, WIDTH)

    def loss_fn(label: int) -> Callable[[Tensor], Tensor]:
        return lambda y: F.cross_entropy(y, torch.full((ROWS,), label))

    assert find_first_bad_module(model, batch()) is None
    assert find_first_bad_module(model, batch(), loss_fn=loss_fn(3)) is None
    result = found(find_first_bad_module(model, batch(), loss_fn=loss_fn(0)))
    assert result.operation == "aten.masked_fill"
    assert "an infinity on purpose, which reached the loss" in result.message


def test_a_value_that_was_read_and_healed_is_no_fault_though_kept() -> None:
    """log(0) that is held at the end: forgotten where it was read, named where not."""
    with FirstBadModule() as read:
        kept = torch.zeros(3).log()
        healed = kept.exp()
        view = kept.detach()[:2]
    with FirstBadModule() as unread:
        also = torch.zeros(3).log()

    assert healed.tolist() == [0.0] * 3
    assert read.result is None
    assert found(unread.result).operation == "aten.log"
    assert torch.equal(view, also[:2])


def test_what_no_one_keeps_or_a_backward_leaves_out_is_no_fault() -> None:
    """A result that is dropped unread, and an output that is no part of the loss."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), torch.zeros(2).log()

    with FirstBadModule() as dropped:
        torch.zeros(2).log()
    model = Two()
    with FirstBadModule(model) as left_out:
        y, other = model(batch())
        y.sum().backward()

    assert dropped.result is None
    assert not other.isfinite().any()
    assert left_out.result is None
    assert found(find_first_bad_module(model, batch())).operation == "aten.log"


def test_memory_that_is_not_written_or_written_over_is_no_fault() -> None:
    """Half-filled buffers hold anything; a value replaced in place is forgotten."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        with FirstBadModule() as block:
            buffer = torch.empty(4)
            buffer[:2] = 1.0
            healed = torch.zeros(3).log()
            healed.nan_to_num_(neginf=-1.0)
    finally:
        torch.use_deterministic_algorithms(False)

    assert buffer[3].isnan()
    assert healed.tolist() == [-1.0] * 3
    assert block.result is None, str(block)


def test_zero_times_infinity_is_named_where_it_is_made() -> None:
    """The mask that multiplies by -Inf: NaN at every place that it should keep."""
    with FirstBadModule() as block:
        scores = torch.ones(3, 3)
        mask = torch.ones(3, 3).triu(1) * -INF
        out = (scores + mask).softmax(-1)

    assert found(block.result).operation == "aten.mul"
    assert out.isnan().all()


def healthy() -> dict[str, tuple[nn.Module, tuple[Any, ...], Callable[..., Tensor]]]:
    """Make models whose healthy runs pass through infinities, or garbage."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, 5, 16)
    pad = torch.zeros(ROWS, 5, dtype=torch.bool)
    pad[:, 3:] = True
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    image = torch.randn(2, 3, 8, 8)
    conv = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2, padding=1)
    )

    def ctc(y: Tensor) -> Tensor:
        labels = torch.tensor([[1, 1], [2, 3]])
        return F.ctc_loss(
            y[:2].log_softmax(-1).transpose(0, 1), labels,
            torch.tensor([5, 5]), torch.tensor([2, 2]),
        )  # fmt: skip

    return {
        "encoder": (encoder, (x, None, pad), torch.sum),
        "causal": (
            encoder,
            (x, nn.Transformer.generate_square_subsequent_mask(5)),
            torch.sum,
        ),
        "ctc": (nn.Linear(16, 8), (x,), ctc),
        "lstm": (nn.LSTM(16, 8), (x,), lambda y: y[0].sum()),
        "conv": (conv, (image,), torch.sum),
        "dropout": (nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5)), (x,), torch.sum),
        "where": (nn.Linear(16, 8), (x,), lambda y: y.where(y > 0, 0).log1p().sum()),
        "log under where": (
            nn.Linear(16, 8),
            (x,),
            lambda y: torch.where(y > 0, y.clamp(min=0).log(), y).sum(),
        ),
        "fp8": (fp8.Linear(16, 16), (torch.randn(16, 16),), torch.sum),
        "embedding": (nn.Embedding(9, 4, 0), (torch.tensor([0, 3]),), torch.sum),
    }


@pytest.mark.parametrize("name", healthy())
def test_healthy_models_raise_no_alarm(name: str) -> None:
    """Padding masks, max pooling, CTC, log(0) under a where, FP8: nothing is named."""
    model, inputs, loss_fn = healthy()[name]
    context = fp8.autocast(enabled=True) if name == "fp8" else nullcontext()
    for mode in (True, False):
        model.train(mode)
        with context if mode else nullcontext():
            assert find_first_bad_module(model, *inputs) is None
        with (
            fp8.autocast(enabled=True) if name == "fp8" else nullcontext(),
            FirstBadModule(model) as block,
        ):
            torch.autograd.backward(loss_fn(model(*inputs)))
        assert block.result is None, str(block)
        assert str(block) == "no NaN or Inf did harm"


# What it leaves as it was


def snapshot(model: nn.Module) -> list[Any]:
    """Take what may not change."""
    return [
        [t.detach().clone() for t in model.state_dict().values()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.grad is not None and p.grad.data_ptr() for p in model.parameters()],
        torch.get_rng_state(),
        [m.training for m in model.modules()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
    ]


def same(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Compare nested lists of tensors."""
    if isinstance(a, Tensor):
        return torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("fault", ["none", "exp", "backward of sqrt", "error"])
def test_the_function_leaves_everything_as_it_was(fault: str) -> None:
    """Weights, buffers, gradients, random state, modes, hooks; after an error too."""
    body = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)]
    model = nn.Sequential(*body, Fault(fault))
    model[2].eval()
    model(batch()).sum().backward()
    model[0].bias.grad = None
    before = snapshot(model)

    if fault == "error":
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            find_first_bad_module(model, torch.ones(3, 5), loss_fn=torch.sum)
    else:
        find_first_bad_module(model, batch(), loss_fn=torch.sum)

    assert same(before, snapshot(model))


class Draws(nn.Module):
    """Draws from Python and NumPy, and has a buffer from its first call on."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale what comes."""
        self.register_buffer("cache", x.new_zeros(1), persistent=False)
        scale = random.random() + np.random.rand()  # noqa: NPY002 - what others use
        return x * scale


def test_the_function_draws_no_number_of_another_library_and_adds_no_buffer() -> None:
    """Python's and NumPy's random states, and what buffers there are, are as before."""

    def state() -> tuple[object, bytes]:
        numbers: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        return random.getstate(), numbers["state"]["key"].tobytes()

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Draws())
    np.random.seed(0)  # noqa: NPY002 - the next draw makes new numbers
    before = state()

    assert find_first_bad_module(model, batch(), loss_fn=torch.sum) is None
    assert state() == before
    assert not list(model.buffers())


def test_an_error_carries_what_was_found() -> None:
    """A loss that refuses NaN hides its origin; the note to its error names it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fault("zero by zero"), nn.Sigmoid())

    def loss_fn(y: Tensor) -> Tensor:
        return F.binary_cross_entropy(y, torch.ones_like(y))

    with pytest.raises(RuntimeError, match="between 0 and 1") as info:
        find_first_bad_module(model, batch(), loss_fn=loss_fn)
    (note,) = info.value.__notes__
    assert note.startswith("NaN or Inf before: forward: aten.div in '1', Fault")

    with pytest.raises(ValueError, match="must return one number") as refusal:
        find_first_bad_module(model, batch(), loss_fn=lambda y: y)
    assert not hasattr(refusal.value, "__notes__")  # it is no consequence of a NaN


@pytest.mark.parametrize("is_bad", [False, True])
def test_a_sparse_gradient_is_read(is_bad: bool) -> None:
    """What backward makes of an embedding's gradient is found in sparse form too."""
    table = nn.EmbeddingBag(20, WIDTH, sparse=True)
    model = nn.Sequential(table, Fault("backward of sqrt" if is_bad else "none"))
    result = find_first_bad_module(model, torch.arange(8).view(2, 4), loss_fn=torch.sum)

    assert (result is not None) == is_bad
    if is_bad:
        assert (found(result).module, found(result).phase) == ("1", "backward")


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # jvp's
@pytest.mark.parametrize("is_bad", [False, True])
@pytest.mark.parametrize("way", ["vmap", "grad", "jvp"])
def test_transforms_of_torch_func_are_read(way: str, is_bad: bool) -> None:
    """Of forward mode some tangents are zeros without memory."""
    torch.manual_seed(0)
    first, inner = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleDict({"first": first, "inner": inner})
    if is_bad:
        nn.init.constant_(inner.weight, math.inf)
    with FirstBadModule(model) as found:
        x = first(torch.randn(4, 8))
        if way == "vmap":
            y: Tensor = torch.func.vmap(inner)(x)
        elif way == "grad":
            y = torch.func.grad(lambda z: inner(z).square().sum())(x)
        else:
            y = torch.func.jvp(inner, (x,), (torch.ones_like(x),))[1]
        torch.autograd.backward(y.mean())
    expected = "parameter inner.weight holds NaN or Inf" if is_bad else "no NaN or Inf"
    assert str(found).startswith(expected)


def test_the_block_changes_no_number() -> None:
    """A run within it has the same weights, gradients and draws, bit for bit."""
    outcomes = []
    for watched in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Dropout(0.3)]
        model = nn.Sequential(*layers, nn.Linear(32, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        with FirstBadModule(model) if watched else nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(batch()).square().mean()
                torch.autograd.backward(loss)
                optimizer.step()
        outcomes.append(snapshot(model)[:2] + snapshot(model)[3:])

    assert same(*outcomes)


def test_an_error_in_the_block_ends_it_and_keeps_what_was_found() -> None:
    """The exception passes, hooks are gone, the result is there; it can be reused."""
    model = chain("none", "exp")
    before = snapshot(model)
    block = FirstBadModule(model)

    def fail() -> None:
        with block:
            model(torch.cat([model(batch()), torch.zeros(1, 3)]))

    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        fail()

    assert found(block.result).module == "1.odd"
    assert same(before[3:], snapshot(model)[3:])
    with block:
        model(batch() * 0).sum()
    assert found(block.result).module == "1.odd"
    with block:
        pass
    assert block.result is None


@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
def test_it_works_around_a_lightning_trainer() -> None:
    """``with`` around ``trainer.fit``: the module's path in the LightningModule."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning = quiet_import("lightning")
    plugins = quiet_import("lightning.pytorch.plugins")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = chain("none", "half", "none")

        def training_step(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x).square().mean()
            return result

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    scaler = torch.amp.GradScaler("cpu")
    trainer = lightning.Trainer(
        plugins=plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler),
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    lit = Lit()
    with FirstBadModule(lit) as block:
        trainer.fit(lit, torch.utils.data.DataLoader(batch(), batch_size=2))  # type: ignore[arg-type]

    result = found(block.result)
    assert (result.module, result.operation) == ("net.1.odd", "aten.add")


# Errors


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    """One clear error each; the model is as it was."""
    model, x = chain("none"), batch()
    before = snapshot(model)
    compiled = copy.copy(model)
    compiled.__dict__["_orig_mod"] = model
    for bad in (3, compiled):
        with pytest.raises(TypeError, match="and not compiled, got"):
            FirstBadModule(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="and not compiled, got"):
            find_first_bad_module(bad, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must be callable, got int"):
        find_first_bad_module(model, x, loss_fn=3)  # type: ignore[arg-type]
    scales: list[Any] = [0.0, -1.0, INF, math.nan, "x", None, 2j, torch.ones(2)]
    for scale in scales:
        text = f"scale must be finite and > 0, got {scale!r}"
        with pytest.raises(ValueError, match=re.escape(text)):
            find_first_bad_module(model, x, loss_fn=torch.sum, scale=scale)
    scales = [2, np.float32(2), torch.tensor(2.0)]
    for scale in scales:
        assert find_first_bad_module(model, x, loss_fn=torch.sum, scale=scale) is None
    with pytest.raises(ValueError, match=r"must return one number .* got \(4, 8\)"):
        find_first_bad_module(model, x, loss_fn=lambda y: y)
    with pytest.raises(ValueError, match=r"must return one number .* got float"):
        find_first_bad_module(model, x, loss_fn=lambda y: 3.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="the loss needs no gradient"):
        find_first_bad_module(model, x, loss_fn=lambda y: y.detach().sum())
    block = FirstBadModule(model)
    with block, pytest.raises(RuntimeError, match="open already"):
        block.__enter__()

    assert same(before, snapshot(model))


def test_random_chains_are_searched_right() -> None:
    """A hundred chains with random faults: the first that runs is named."""
    draw = random.Random(0)
    kinds = ["none", "none", "none", *FORWARD]
    for _ in range(100):
        faults = [draw.choice(kinds) for _ in range(4)]
        model = chain(*faults)
        result = find_first_bad_module(model, batch(), loss_fn=torch.sum)
        bad = [i for i, fault in enumerate(faults) if fault != "none"]
        assert (result and result.module) == (f"{bad[0]}.odd" if bad else None)
