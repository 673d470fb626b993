"""Compare what a block printed, or raised, with what the page shows."""

import doctest
import re
import traceback
from decimal import Decimal

__all__ = ["NUMBER", "Checker", "expected_exception", "raised", "vague"]

NUMBER = doctest.register_optionflag("NUMBER")

# A float: it has a point or an exponent. Integers are compared as text, exactly.
_FLOAT = re.compile(
    r"(?<![\w.])[+-]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])"
)
# doctest's own pattern: the stack is whatever is indented, the message is the rest.
_TRACEBACK = doctest.DocTestParser._EXCEPTION_RE  # type: ignore[attr-defined]


class Checker(doctest.OutputChecker):
    """Doctest's checker, and ``+NUMBER``: floats agree to the digits shown."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """Tell whether ``got`` is what ``want`` announces."""
        if optionflags & NUMBER:
            got = _shown(want, got)
        return super().check_output(want, got, optionflags)


def _shown(want: str, got: str) -> str:
    """Replace each float of ``got`` that rounds to its partner in ``want`` by it."""
    partners = [match[0] for match in _FLOAT.finditer(want)]
    if len(partners) != len(_FLOAT.findall(got)):
        return got
    queue = iter(partners)

    def same(match: re.Match[str]) -> str:
        shown = next(queue)
        unit = Decimal(1).scaleb(int(Decimal(shown).as_tuple().exponent))
        near = abs(Decimal(match[0]) - Decimal(shown)) <= unit / 2
        return shown if near else match[0]

    return _FLOAT.sub(same, got)


def expected_exception(want: str | None) -> str | None:
    """Return the exception that ``want`` announces, as ``Type: message``, or None."""
    match = _TRACEBACK.match(want or "")
    return match["msg"] if match else None


def raised(error: BaseException) -> str:
    """Return ``Type: message`` as the interpreter would print it."""
    lines = traceback.format_exception_only(type(error), error)
    # A SyntaxError prints the offending line first; its message comes last.
    return lines[-1] if isinstance(error, SyntaxError) else "".join(lines)


def vague(message: str) -> bool:
    """Tell whether an expected exception matches nearly any: ``ValueError: ...``."""
    name, _, detail = message.partition(":")
    return "..." in name or ("..." in detail and len(re.sub(r"\W", "", detail)) < 4)
