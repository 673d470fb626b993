"""The rules of a run: their limits, and what happens where one is broken."""

from collections.abc import Mapping
from typing import Any

# Rule -> limit and action. A rule breaks where the number passes its limit.
RULES: dict[str, tuple[float, str]] = {
    "nonfinite": (0, "warn"),  # NaN or Inf that no loss scaler is there to skip
    "min_scale": (1.0, "warn"),  # below it float16 reaches further than without a scale
    "max_consecutive_skips": (20, "warn"),  # of 2**16 the 20th half is 2**-4
    "max_lost": (0.9, "warn"),  # share of updates of 16-bit weights that change nothing
    "max_underflow": (0.5, "warn"),  # share of gradients that the format rounds to zero
    "max_zero_steps": (1, "warn"),  # in a row, measured, all 0 in unscaled float16
}
_ACTIONS = ("raise", "warn", "ignore")


class NumericsWarning(UserWarning):
    """A rule of a `NumericsMonitor` is broken."""


class NumericsError(RuntimeError):
    """A rule whose action is "raise" is broken."""


def complete(given: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return all rules, those that are not given as in `RULES`.

    Raises:
        TypeError: A limit is no number, or ``given`` no mapping.
        ValueError: A rule or an action is unknown, or a limit negative or NaN.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"rules must be a mapping of {[*RULES]}, got {given!r}")
    rules = dict(RULES)
    for name, value in given.items():
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}, allowed are {[*RULES]}")
        limit, action = RULES[name]
        if isinstance(value, str):
            action = value
        elif isinstance(value, tuple) and len(value) == 2:
            limit, action = value
        else:
            limit = value
        if type(limit) not in {int, float}:
            raise TypeError(f"rule {name!r}: the limit must be a number, got {limit!r}")
        if not limit >= 0:  # also refuses NaN
            raise ValueError(f"rule {name!r}: the limit must be >= 0, got {limit}")
        if action not in _ACTIONS:
            raise ValueError(f"rule {name!r}: allowed are {_ACTIONS}, got {action!r}")
        rules[name] = limit, action
    return rules
