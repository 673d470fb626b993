"""Watch one step: modules by hooks, and each operation of the forward pass."""

import math
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .formats import FORMATS
from .islands import Casts, Islands
from .report import KINDS, Constant, Row
from .rounding import fill
from .samples import Samples, Value, tensors_in
from .step import call, next_step, problem_with

# What autocast runs in 16 bits, and what in FP32 whatever comes (CUDA's lists), as ATen
# calls it. All else is in 16 bits if all tensors that go in are.
_LOWERS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "addr", "linear", "dot",
    "matmul", "convolution", "mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused_lstm_cell",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math",
}  # fmt: skip
_NORMS = {"native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"}
_NORMS_FP32 = {"native_layer_norm", "native_group_norm", "_fused_rms_norm"}
_RAISES = _NORMS_FP32 | {
    "exp", "expm1", "log", "log2", "log10", "log1p", "pow", "rsqrt", "reciprocal",
    "acos", "asin", "cosh", "sinh", "tan", "erfinv", "softplus", "_softmax", "sum",
    "_log_softmax", "prod", "cumsum", "cumprod", "linalg_vector_norm", "norm", "dist",
    "_cdist_forward", "mse_loss", "huber_loss", "smooth_l1_loss", "nll_loss_forward",
    "nll_loss2d_forward", "binary_cross_entropy", "soft_margin_loss",
}  # fmt: skip
_FP16, _FP32 = FORMATS["float16"], torch.finfo(torch.float32)
# A code that asks finfo for its mask or eps will ask again in another dtype.
_ADAPTIVE = {_FP32.max, _FP32.tiny, _FP32.eps}
_ONE = 2.0**-9  # 1 - 2**-9 is 1 in BF16
_HERE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows each operation to a watch."""

    def __init__(self, watch: "Watch") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        self.watch.see(func, args, kwargs or {}, result)
        return result


class Watch:
    """What is seen of one step."""

    def __init__(self, model: nn.Module, progress: Callable[[str], None]) -> None:
        self.model, self.progress = model, progress
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(m): name for name, m in model.named_modules()}
        self.samples = Samples()
        self.constants: dict[Constant, None] = {}  # a set in order
        self.notes: list[str] = []
        self.is_backward = False
        self.handles = ExitStack()
        self.running: list[nn.Module] = []
        self.islands = Islands()
        self.softmaxed: list[tuple[int, Tensor]] = []  # limits, and least row's largest
        self.done = 0
        self.values: dict[int, tuple[Any, Value]] = {}  # by storage, which views share
        self.kinds: dict[Any, tuple[str, bool]] = {}  # of operations
        self.outputs: dict[tuple[str, str], Value] = {}
        self.trained: dict[str, tuple[int, int]] = {}  # limits of weight and gradient
        self.inside: list[tuple[str, str, tuple[int, ...], int, bool]] = []
        self.order: list[tuple[str, str, int]] = []  # module, what, limits

    @property
    def module(self) -> str:
        """The name of the module that runs."""
        return self.names[id(self.running[-1])] if self.running else "(loss)"

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor: nothing yet, if it is new."""
        storage = tensor.untyped_storage()
        ref, value = self.values.get(storage._cdata, (None, None))
        if ref is None or value is None or ref() is None:
            value = Value()
            self.values[storage._cdata] = weakref.ref(storage), value
        return value

    def limit(self, tensor: Tensor, value: Value, module: str, what: str) -> int:
        """Return where the limits of a tensor are; take them if they are not known."""
        size, whole = tensor.nbytes, tensor.untyped_storage().nbytes()
        part = (tensor.storage_offset(), *tensor.shape, *tensor.stride())
        key = part if size != whole else ()  # a transpose has the same numbers
        if key not in value.limits:
            value.limits[key] = self.samples.limit(tensor)
            self.order.append((module, what, value.limits[key]))
        return value.limits[key]

    # -- forward

    def forward(self, batch: Any, loss_fn: Callable[..., Any] | None) -> Tensor:  # noqa: ANN401
        """Run the model and the loss; check that there is something to learn from.

        Raises:
            ValueError: One of them fails, or the loss is no scalar with gradients.
            MemoryError: The host has no more.
            torch.OutOfMemoryError: The device has no more.
        """
        self.progress("forward pass")
        enter = hooks.register_module_forward_pre_hook(self.enter)
        self.handles.callback(enter.remove)
        leave = hooks.register_module_forward_hook(self.leave, with_kwargs=True)
        self.handles.callback(leave.remove)
        # PyTorch 2.13 leaves the mark of such a hook behind, and torch.compile warns.
        marks = hooks._global_forward_hooks_with_kwargs
        self.handles.callback(marks.pop, leave.id, None)
        try:
            with self.islands.followed(), Casts(self.widen), _Operations(self):
                loss: Tensor = call(self.model, batch, loss_fn)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            at = f"`{self.module}`" if self.module else "the model"
            name = type(error).__name__
            hint = "; a loss_fn that calls the model has a first parameter `model`"
            is_called = name == "TypeError" and str(error).endswith("not callable")
            raise ValueError(
                f"this batch does not fit the model and loss_fn: {at} raises {name}: "
                f"{error}{hint if is_called else ''}"
            ) from error
        if problem := problem_with(loss, loss_fn):
            raise ValueError(problem)
        return loss

    def enter(self, module: nn.Module, args: object) -> None:
        """Take what goes into a module, before it can change it."""
        if id(module) not in self.names:
            return
        self.running.append(module)
        if self.is_backward or not self.is_shown(module):
            return
        if not self.is_transformed(module):
            self.show(module, "input", args)

    def leave(
        self, module: nn.Module, _: object, kwargs: object, output: object
    ) -> None:
        """Take what comes out, and ask for its gradient."""
        if id(module) not in self.names:
            return
        while self.running and self.running.pop() is not module:
            pass  # what it called ended with an error that it caught
        if not self.is_shown(module) or self.is_transformed(module):
            return
        if not self.is_backward:
            self.show(module, "input", kwargs)
            self.show(module, "output", output)
            self.done += 1
            self.progress(f"forward pass, {self.done} modules")
        name = self.names[id(module)]
        for place, tensor in tensors_in(output):
            if tensor.requires_grad:
                # In a reentrant checkpoint the first pass has no gradients.
                value = self.outputs.get((name, place)) or self.value(tensor)
                row = Row(name, "grad_output", place, (), layer=type(module).__name__)
                self.follow(tensor, row, value)

    def widen(self, tensor: Tensor) -> Tensor:
        """Return what a cast to FP32 makes of a tensor that autocast has in 16 bits."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return tensor
        if not self.value(tensor).low:
            return tensor
        wide = tensor.clone()
        self.value(wide).low = False
        return wide

    def is_shown(self, module: nn.Module) -> bool:
        """Whether a module has rows: it has parameters of its own, or no modules."""
        return bool(module._parameters or not module._modules or module is self.model)

    def is_transformed(self, module: nn.Module) -> bool:
        """Whether a transform of torch.func runs, whose tensors cannot be read."""
        if torch._C._functorch.peek_interpreter_stack() is None:
            return False
        name = self.names[id(module)] or "the model"
        note = f"not seen, as torch.func transforms it: what {name} takes and returns"
        if note not in self.notes:
            self.notes.append(note)
        return True

    def show(self, module: nn.Module, kind: str, things: object) -> None:
        """Take the tensors in ``things`` for a module's rows."""
        found = tensors_in(things)
        if not found:
            return
        name, layer = self.names[id(module)], type(module).__name__
        with _disable_current_modes():  # these operations are not the model's
            for place, tensor in found:
                value = self.value(tensor)
                if kind == "output":
                    self.outputs[name, place] = value
                row = Row(name, kind, place, tuple(tensor.shape), layer=layer)
                self.take(row, tensor, value)

    def take(self, row: Row, tensor: Tensor, value: Value) -> int:
        """Take a tensor whose numbers are those of ``value``; return its limits."""
        limits = self.limit(tensor, value, row.module, row.kind)
        self.samples.take(row, tensor, value, limits)
        return limits

    def follow(self, tensor: Tensor, row: Row, value: Value) -> None:
        """Take the gradient of a tensor when it comes."""

        def hook(grad: Tensor) -> None:
            row.shape = tuple(grad.shape)
            limits = self.samples.limit(grad)
            self.order.append((row.module, row.kind, limits))
            self.samples.take(row, grad, value, limits)

        self.handles.callback(tensor.register_hook(hook).remove)  # type: ignore[no-untyped-call]

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        """Follow values through an operation; take its range and its constants."""
        kind = self.kinds.get(func)
        if kind is None:
            name = func.overloadpacket.__name__
            aliases = [a.alias_info for a in func._schema.arguments if a.alias_info]
            is_view = bool(aliases) and not any(a.is_write for a in aliases)
            is_skipped = is_view or "empty" in name or name == "_unsafe_view"
            kind = self.kinds[func] = name, is_skipped
        name, is_skipped = kind
        if is_skipped:
            return
        ins = [(self.value(t), t.dim()) for _, t in tensors_in(args)]
        outs = [t for _, t in tensors_in(result)]
        if not outs:
            for value, _ in ins:
                value.index |= name == "_to_copy"
            return
        if name in _LOWERS and not self.islands.inside:
            for value, _ in ins:
                operand: Value | None = value
                while operand:
                    operand.cast, operand = True, operand.source
        module = self.module
        if name == "_softmax":
            at = self.limit(args[0], ins[0][0], module, "input")
            self.softmaxed.append((at, args[0].detach().amax(args[1]).amin()))
        # Asked for by name, as in zeros_like(x, dtype=torch.float32).
        is_wide = kwargs.get("dtype") in {torch.float32, torch.float64}
        low = self.is_low(name, ins) and not is_wide
        is_norm = name in _NORMS or name in _NORMS_FP32
        for out in outs[:1] if is_norm else outs:  # statistics stay in FP32
            value, storage = Value(low=low), out.untyped_storage()
            value.source = ins[0][0] if name == "clone" else None
            self.values[storage._cdata] = weakref.ref(storage), value
            limits = self.limit(out, value, module, name)
            self.inside.append((module, name, out.shape, limits, low))
        if not is_norm:
            for number in (*args, *kwargs.values()):
                if isinstance(number, float) and abs(number) not in _ADAPTIVE:
                    self.weigh(number, name, outs[0], low=low)

    def is_low(self, name: str, ins: list[tuple[Value, int]]) -> bool:
        """Say whether autocast would have the result in 16 bits."""
        if not ins:
            return False
        if not self.islands.inside and name in _LOWERS | _RAISES:
            return name in _LOWERS
        if name in _NORMS:
            return ins[0][0].low
        wide = [value.low for value, dim in ins if dim]
        return all(wide or [value.low for value, _ in ins])

    def weigh(self, number: float, name: str, out: Tensor, *, low: bool) -> None:
        """Note a constant that FP16 makes 0 or Inf, and whether that is felt."""
        size = abs(number)
        if name.startswith(("mul", "div")):
            return  # the product is rounded, not the constant
        if name.startswith("clamp") and 0 < abs(1 - size) <= _ONE:
            bites = bool((out.abs() >= 1 - _ONE).any())  # a bound that keeps log from 0
        elif size >= _FP16.overflow and math.isfinite(size):
            bites = True
        elif 0 < size <= _FP16.zero:
            bites = bool(((out.abs() <= _FP16.zero) & (out != 0)).any())
        else:
            return
        where, frame = "", sys._getframe(2)
        while frame.f_back and not where:
            if not frame.f_code.co_filename.startswith(_HERE):
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back
        constant = Constant(number, self.module, name, where, low, bites)
        self.constants[constant] = None

    # -- backward, and what follows from it

    def backward(self, loss: Tensor) -> None:
        """Run backward, and take weights, buffers and their gradients."""
        self.progress("backward pass")
        self.is_backward = True
        torch.autograd.backward(loss)
        self.handles.close()
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and buffer.numel():
                self.take(self.row(name, "weight", buffer), buffer, self.value(buffer))
        for name, parameter in self.model.named_parameters():
            value = self.value(parameter)
            if not parameter.numel():
                continue
            weight = self.take(self.row(name, "weight", parameter), parameter, value)
            if parameter.grad is not None:
                row = self.row(name, "grad_weight", parameter)
                limits = self.samples.limit(parameter.grad)
                self.trained[name] = weight, limits
                self.order.append((row.module, row.kind, limits))
                self.samples.take(row, parameter.grad, value, limits)
            elif parameter.requires_grad:
                self.notes.append(f"no gradient in this step: {name}")

    def row(self, name: str, kind: str, tensor: Tensor) -> Row:
        """Make the row of a parameter or buffer."""
        module, _, own = name.rpartition(".")
        layer = type(self.modules[module]).__name__
        return Row(module, kind, own, tuple(tensor.shape), layer=layer)

    def updates(self, lr: float, optimizer: Optimizer | None) -> str:
        """Take what a step adds to each weight; say by which hypothesis."""
        self.progress("updates")
        parameters = {n: p for n, p in self.model.named_parameters() if p.numel()}
        steps = next_step(optimizer, list(parameters.values())) if optimizer else {}
        for name, parameter in parameters.items():
            if parameter.grad is None or (optimizer and id(parameter) not in steps):
                continue
            samples, (weight, grad) = self.samples, self.trained[name]
            if optimizer:
                limits = samples.limit(steps[id(parameter)])
                update = samples.pick(steps[id(parameter)])
            else:
                limits = samples.sign(grad, -lr)
                update = samples.picked[grad].sign() * -lr
            row = self.row(name, "update", parameter)
            samples.update(row, update, samples.picked[weight], limits)
        if optimizer:
            return f"the next step of this {type(optimizer).__name__}"
        return f"AdamW's first step with lr={lr:g}"

    def close(self, formats: tuple[str, ...], loss: float) -> tuple[list[Row], str]:
        """Return all rows, and where FP32 itself fails first."""
        self.progress("rounding")
        limits = fill(self.samples, formats)
        modules = {row.module: None for row, _, _ in self.samples.rows.values()}
        order = {name: i for i, name in enumerate(modules)}
        rows = [row for row, _, _ in self.samples.rows.values()]
        rows.sort(key=lambda row: (order[row.module], KINDS.index(row.kind)))
        largest = {i: max(map(abs, pair)) for i, pair in enumerate(limits)}
        inside: dict[tuple[str, str, bool], Row] = {}
        # Before a softmax -9e15 hides as -Inf does, where no row is hidden whole.
        masks = {limits[at][0] for at, row in self.softmaxed if row > -_FP16.overflow}
        for module, name, shape, at, low in self.inside:
            amax, (least, most) = largest[at], limits[at]
            is_mask = most < _FP16.overflow and least in masks
            is_shown = at in self.samples.picked
            if _FP16.overflow <= amax < _FP32.max and not is_shown and not is_mask:
                new = Row(module, "inside", name, tuple(shape), low=low)
                row = inside.setdefault((module, name, low), new)
                row.amax, row.calls = max(row.amax, amax), row.calls + 1
        for row in inside.values():
            one = 1 / max(math.prod(row.shape), 1)
            for name in formats:
                fmt = FORMATS[name]
                over = one if row.amax >= fmt.overflow else 0.0
                row.formats[name] = {
                    "underflow": 0.0,
                    "overflow": over,
                    "sqnr_db": None,
                }
        rows += inside.values()
        grads = [row for row in rows if row.kind == "grad_weight"]
        if math.isfinite(loss) and all(row.is_finite for row in grads):
            return rows, ""
        for module, what, at in self.order:
            least, most = limits[at]
            # -Inf alone can be a mask's, which softmax makes a zero.
            if math.isnan(least) or most == math.inf:
                return rows, f"`{module or 'model'}` ({what})"
        return rows, "`(loss)`"
