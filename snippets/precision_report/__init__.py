"""Tell from one FP32 step what each lower precision would do to your model.

Copy this folder into your project; it needs only ``torch`` (2.6 or newer).

`precision_report` runs one forward and backward pass and leaves no trace. From a shell,
``python -m snippets.precision_report my_script:build`` does it, beside a copy ``python
-m precision_report my_script:build``. ``figure`` needs matplotlib, ``to_dataframe``
pandas.

    Guide:   guide/precision_report
    Tests:   tests/test_precision_report.py
    Sources: Micikevicius et al. 2018, arXiv:1710.03740, section 3 (histograms of
             gradients, loss scaling); Micikevicius et al. 2022, arXiv:2209.05433,
             section 3 (E4M3, E5M2); Open Compute Project 2023, Microscaling Formats
             1.0, section 6.3 (scales); PyTorch 2.13, docs/source/amp.md (autocast).
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .formats import ALIASES, DEFAULT, FORMATS, MODES, Format, Mode
from .judge import judge
from .report import Constant, Finding, PrecisionReport, Row, Verdict, suggest
from .samples import tensors_in
from .step import unchanged, unwrapped
from .watch import Watch

__all__ = ["ALIASES", "FORMATS", "MODES", "Constant", "Finding", "Format", "Mode"]
__all__ += ["PrecisionReport", "Row", "Verdict", "precision_report"]


def precision_report(
    model: nn.Module,
    batch: Any,  # noqa: ANN401 - whatever the model takes
    loss_fn: Callable[..., Any] | None = None,
    formats: Iterable[str] = DEFAULT,
    *,
    lr: float = 1e-3,
    optimizer: Optimizer | None = None,
    progress: Callable[[str], None] | None = None,
) -> PrecisionReport:
    """Run one forward and backward pass in FP32 and foretell the lower precisions.

    The model runs in the mode it is in. Afterward parameters, their ``.grad``, buffers,
    attributes of modules, random states and the optimizer are what they were, bit for
    bit, also when an error is raised. Shares and SQNR are of up to 4,096 numbers of a
    tensor (128 times 32 in a row, the same places at each call); amax, Inf and NaN are
    of all. Meanwhile it holds a copy of parameters and buffers, and the gradients.

    FP8 per tensor has the scale that makes amax the format's largest number, as current
    scaling does, and delayed scaling once amax is steady; MX has the scale of the
    specification for 32 numbers in a row.

    Args:
        model: Parameters in float32 or float64. Of one that is compiled, in DDP or
            DataParallel, or set up by Fabric, the original runs, on this rank alone.
        batch: A tuple or list is ``(*inputs, target)``; a dict goes in by keywords; all
            else is the one input, and the target as well.
        loss_fn: ``loss_fn(output, target)`` -> scalar, or ``loss_fn(output)``. A second
            parameter called ``batch`` gets all of the batch, and with a first one
            called ``model`` it calls the model itself: ``loss_fn(model, batch)``. None
            where the model returns its loss. A dict or an output has it as ``loss``.
        formats: Names in `FORMATS`. There is a verdict for each of `MODES` whose
            formats are all there.
        lr: Learning rate > 0 where there is no ``optimizer``: updates are those of
            AdamW's first step, ``lr`` up or down. While a gradient keeps its sign later
            ones are as large, else smaller: a run loses this share or more.
        optimizer: Over parameters of the model. Its next step is taken on a copy.
        progress: Called with a few words as the work goes on.

    Raises:
        TypeError: ``model`` is no module, or is scripted; ``optimizer`` or ``lr`` is
            none.
        ValueError: No such format; parameters that are none, lazy, all frozen, without
            memory or in half precision; a batch that is empty or does not fit the
            model; a loss that is no real scalar or has no gradients; ``lr`` is not
            positive and finite; an optimizer of another model, or whose step needs a
            closure.

    Example:
        >>> model, x = nn.Linear(16, 16), torch.ones(4, 16)
        >>> report = precision_report(model, (x, x), nn.functional.mse_loss)
        >>> print(report.verdicts["bf16-mixed"])
        bf16-mixed: safe
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's and Fabric's
    model = unwrapped(model)
    chosen = tuple(dict.fromkeys([formats] if isinstance(formats, str) else formats))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model is scripted or traced: give it the model it is made of")
    if not isinstance(optimizer, Optimizer | None):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {got}")
    lr = _number(lr)
    if problem := _problem(model, batch, chosen, lr):
        raise ValueError(problem)
    groups = optimizer.param_groups if optimizer else []
    stepped = {id(p) for group in groups for p in group["params"]}
    if optimizer and stepped.isdisjoint(map(id, model.parameters())):
        raise ValueError("optimizer has no parameter of the model")
    watch = Watch(model, progress or (lambda _: None))
    with ExitStack() as stack:
        prepare = stack.enter_context(unchanged(model, batch, loss_fn))
        stack.enter_context(watch.handles)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(device, enabled=False))
        loss = watch.forward(batch, loss_fn)
        prepare(loss)
        watch.backward(loss)
        with torch.no_grad():
            hypothesis = watch.updates(lr, optimizer)
            value = loss.item()
            rows, broken = watch.close(chosen, value)
    notes = watch.notes
    if not model.training:
        notes.append("the model is in eval mode: dropout and norms differ in training")
    constants = list(watch.constants)
    found = PrecisionReport(rows, constants, chosen, value, hypothesis, notes, broken)
    for name, mode in MODES.items():
        if mode.formats <= set(chosen):
            found.verdicts[name] = judge(found, name, optimizer)
    return found


def _number(lr: Any) -> float:  # noqa: ANN401
    if isinstance(lr, Tensor) and lr.numel() == 1:
        lr = lr.item()
    if isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(f"lr must be a number such as 1e-3, got {lr!r}")
    return float(lr)


def _problem(model: nn.Module, batch: Any, formats: tuple[str, ...], lr: float) -> str:  # noqa: ANN401
    """Say what is wrong, as far as that can be told without running the model."""
    for name in formats:
        if name not in FORMATS:
            return suggest("format", name, FORMATS)
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if p.is_meta or is_lazy(p):
            return f"{name} has no numbers yet: run a lazy model once, load a meta one"
        if p.is_floating_point() and p.dtype.itemsize < 4:
            return (
                f"the model is in half precision already: {name} is {p.dtype}; what "
                "float32 would have kept is lost, so give it the model in float32"
            )
    if not any(p.requires_grad for p in parameters.values()):
        return "the model has no gradients: no parameter requires one"
    if not formats:
        return "formats must name at least one format"
    tensors = [t for _, t in tensors_in(batch, every=True)]
    if tensors and not any(t.numel() for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        return f"the batch is empty: it has nothing but shape {shapes}"
    return "" if 0 < lr < math.inf else f"lr must be positive and finite, got {lr}"
