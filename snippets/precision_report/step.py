"""Run a step, take an optimizer's next step on a copy, and leave no trace."""

import copy
import inspect
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .samples import tensors_in

_PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set}


def unwrapped(model: Any) -> Any:  # noqa: ANN401
    """Return what torch.compile, data parallelism and Fabric have wrapped.

    Without them there is nothing to wait for on other ranks.
    """
    while True:
        is_fabric = type(model).__name__ == "_FabricModule"
        if is_fabric or isinstance(model, _PARALLEL):
            model = model.module
        elif isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def call(model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None) -> Any:  # noqa: ANN401
    """Call the model and the loss function as `precision_report` says."""
    names = _names(loss_fn)
    if loss_fn is not None and names[:1] == ["model"]:
        return _loss_in(loss_fn(model, batch))
    has_target = isinstance(batch, (tuple, list)) and len(batch) > 1
    if isinstance(batch, Mapping):
        output, target = model(**batch), batch
    elif isinstance(batch, (tuple, list)):
        inputs = batch[:-1] if has_target and loss_fn is not None else batch
        output, target = model(*inputs), batch[-1]
    else:
        output, target = model(batch), batch
    if loss_fn is None:
        return _loss_in(output)
    if len(names) == 1 or not (names or has_target):
        return _loss_in(loss_fn(output))
    return _loss_in(loss_fn(output, batch if names[1:2] == ["batch"] else target))


def _loss_in(output: Any) -> Any:  # noqa: ANN401
    """Return the loss of a dict or of a model's output; of all else, the whole."""
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", output)


def problem_with(loss: object, loss_fn: Callable[..., Any] | None) -> str:
    """Say why backward cannot begin at a loss; "" if it can."""
    who = "the model" if loss_fn is None else "loss_fn"
    kind = type(loss).__name__
    if isinstance(loss, (Mapping, tuple, list)):
        inner = loss if isinstance(loss, Mapping) else map(_kind, loss)
        got = f"got {kind} ({', '.join(map(str, inner))})"
        hint = f"let {who} return the loss alone, or a dict with 'loss'"
        if loss_fn is None:
            hint = "pick it by loss_fn, as in lambda output: output[0]"
        return f"the loss must be a scalar tensor, {got}: {hint}"
    if loss is None:
        hint = "does the batch have labels?" if loss_fn is None else "has it a return?"
        return f"the loss must be a scalar tensor, but {who} returns None: {hint}"
    if not isinstance(loss, Tensor):
        return f"the loss must be a scalar tensor, got {kind}"
    if loss.numel() != 1:
        hint = ": take the mean" if loss.numel() else ", which is empty"
        return f"the loss must be a scalar, got shape {tuple(loss.shape)}{hint}"
    if loss.is_complex():
        hint = "take abs() of what is complex, before the mean"
        return f"the loss must be a real number, got {loss.dtype}: {hint}"
    if not loss.is_floating_point():
        return f"the loss must be of floating point, got {loss.dtype}"
    if not loss.requires_grad:
        return "the loss has no gradients: no trained parameter is in it"
    return ""


def _kind(thing: object) -> str:
    return type(thing).__name__


def _names(loss_fn: Any) -> list[str]:  # noqa: ANN401
    """Return the parameters of a function; none where it is written in C."""
    called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        found = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return []
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in found if p.kind not in by_name]
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found)
    return [*names, "more"] if several else names


def next_step(optimizer: Optimizer, parameters: list[Tensor]) -> dict[int, Tensor]:
    """Take an optimizer's next step on a copy; return what it adds, by parameter id.

    Raises:
        ValueError: Its step needs a closure.
    """
    twins = {id(p): p.detach().clone().requires_grad_() for p in parameters}
    for parameter in parameters:
        twins[id(parameter)].grad = parameter.grad
    twin = copy.deepcopy(optimizer, dict(twins))
    step: Any = twin.step  # the class's: copies have no scheduler's wrapper, no hooks
    try:
        step()
    except TypeError as error:
        name = type(optimizer).__name__
        raise ValueError(f"{name} cannot step on its own: {error}") from error
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        id(p): twins[id(p)].detach() - p.detach()
        for p in parameters
        if id(p) in stepped
    }


@contextmanager
def unchanged(model: nn.Module, *others: object) -> Iterator[Callable[[Tensor], None]]:
    """Put everything back at the end.

    Parameters, buffers, hooks and attributes of modules, if dicts, lists, sets and
    tensors also what is in them; tensors among ``others``, the batch; every ``.grad``;
    random states.

    Yields:
        What to call with the loss before backward.
    """
    roots = [model, *(m for m in others if isinstance(m, nn.Module))]
    modules = [module for root in roots for module in root.modules()]
    attributes = [(m, dict(m.__dict__)) for m in modules]
    inner = [v for _, own in attributes for v in own.values()]
    containers: list[tuple[Any, Any]] = [
        (v, v.copy()) for v in inner if type(v) in _CONTAINERS
    ]
    owned = [t for r in roots for t in (*r.parameters(), *r.buffers())]
    owned += [t for v in inner if isinstance(v, Tensor) for _, t in tensors_in(v)]
    owned += [t for _, t in tensors_in(others, every=True)]
    values = [(t, t.detach().clone()) for t in {id(t): t for t in owned}.values()]
    grads: dict[int, tuple[Tensor, Tensor | None, dict[Any, Any], Any]] = {}

    def set_aside(tensor: Tensor) -> None:
        if tensor.is_leaf and tensor.requires_grad and id(tensor) not in grads:
            called = tensor._post_accumulate_grad_hooks or {}
            grads[id(tensor)] = tensor, tensor.grad, called, dict(called)
            tensor.grad = None
            called.clear()  # autograd holds this dict, whatever the attribute says

    def prepare(loss: Tensor) -> None:
        for tensor in (*owned, *_leaves(loss)):
            set_aside(tensor)

    random_states = _random_states()
    try:
        yield prepare
    finally:
        for restore, state in random_states:
            restore(state)
        for container, content in containers:
            container.clear()
            put_back: Any = getattr(container, "update", None) or container.extend
            put_back(content)
        for module, own in attributes:
            module.__dict__.clear()
            module.__dict__.update(own)
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)
        for tensor, grad, called, saved in grads.values():
            tensor.grad = grad
            called.update(saved)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield every tensor that backward would leave a gradient in."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting += [following for following, _ in node.next_functions]


def _random_states() -> list[tuple[Callable[[Any], object], Any]]:
    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states
