"""What the emulator says of options it has not, above all of more than one rank.

Copy the folder ``fp8`` into your project; it needs only ``torch``.

    Guide:   guide/fp8
    Tests:   tests/test_fp8_parallel.py
    Sources: NVIDIA, Transformer Engine 2.20.2, ``pytorch/module/base.py`` and
             ``pytorch/transformer.py`` (Apache-2.0): names and arguments.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

from typing import Any

import torch

__all__ = ["OneContextRank", "OneRank", "refuse", "refuse_parallel"]


def refuse(module: str, **options: tuple[Any, Any]) -> None:
    """Raise for an option that is not emulated and differs from its default.

    Args:
        module: the class that was given the options.
        options: for each name, the value given and Transformer Engine's default.

    Raises:
        NotImplementedError: names the option, its value and the default.
    """
    for name, (value, default) in options.items():
        if value != default:
            raise NotImplementedError(
                f"{module}({name}={value!r}) is not emulated; leave it at {default!r}."
            )


def refuse_parallel(module: str, tp_size: int, tp_group: Any) -> None:
    """Raise where the weights would be spread over ranks.

    With one rank Transformer Engine ignores ``sequence_parallel``, ``ub_*`` and
    ``symmetric_ar_type``, and so do the modules here. It takes the number of ranks from
    the group, where there is one, and from ``tp_size`` where there is none.

    Args:
        module: the class that was given the options.
        tp_size: ranks, if there is no group.
        tp_group: their process group.

    Raises:
        NotImplementedError: names the option that asks for more than one.
    """
    if tp_group is None:
        refuse(module, tp_size=(tp_size, 1))
    elif (ranks := _ranks(tp_group)) != 1:
        raise NotImplementedError(
            f"{module}(tp_group=...) of {ranks} ranks is not emulated; leave it at "
            "None."
        )


def _ranks(group: Any) -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(group)


class OneRank:
    """Takes a group after the module is made; of one rank, it changes nothing."""

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """Take the group over whose ranks the weights are spread.

        Raises:
            NotImplementedError: it has more than one rank.
        """
        name = f"{type(self).__name__}.set_tensor_parallel_group"
        refuse_parallel(name, 1, tp_group)


class OneContextRank(OneRank):
    """Takes the groups of context parallelism too, as attention does."""

    def set_context_parallel_group(
        self,
        cp_group: Any,
        cp_global_ranks: Any,
        cp_stream: Any,
        cp_comm_type: str = "p2p",
        load_balancing_strategy: Any = None,
    ) -> None:
        """Take the groups over whose ranks a sequence is spread.

        Raises:
            NotImplementedError: one of them has more than one rank.
        """
        groups = cp_group if isinstance(cp_group, list) else [cp_group]
        ranks = max((_ranks(g) for g in groups if g is not None), default=1)
        if ranks != 1:
            raise NotImplementedError(
                f"{type(self).__name__}.set_context_parallel_group(cp_group=...) of "
                f"{ranks} ranks is not emulated; leave it at None."
            )
