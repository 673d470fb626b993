"""What Lightning's Trainer and Fabric call, by their names."""

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:  # no Trainer to be a callback of
    Callback = object  # type: ignore[assignment, misc]

Log = Callable[[dict[str, float], int], Any]  # numbers by name, and the step


class LightningCallback(Callback):
    """Attach to a run of the Trainer or of Fabric, and detach at its end."""

    def attach(self, model: nn.Module, *, scaler: Any, log: Log) -> Any:  # noqa: ANN401
        """Watch a model."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leave it."""
        raise NotImplementedError

    def on_train_start(
        self,
        trainer: Any = None,  # noqa: ANN401 - Trainer's; none of them in Fabric
        pl_module: Any = None,  # noqa: ANN401
    ) -> None:
        """Attach to the Trainer's model, its scaler and its loggers."""
        if trainer is None:
            return

        def log(numbers: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.detach()
        self.attach(pl_module, scaler=scaler, log=log)

    def on_after_setup(self, fabric: Any, module: Any) -> None:  # noqa: ANN401
        """Attach to what ``fabric.setup`` was called with, its scaler and loggers."""
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.detach()
        self.attach(module.module, scaler=scaler, log=fabric.log_dict)

    def on_train_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach; with Fabric, ``fabric.call("on_train_end")``."""
        self.detach()

    def on_exception(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach."""
        self.detach()

    def teardown(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Detach."""
        self.detach()
