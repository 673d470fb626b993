"""The number format explorer: its data, and what stands there without JavaScript.

.. code-block:: md

   ```{number-explorer} 0.3
   :format: float8_e4m3fn

   65520 | float16 | rounds to Inf
   ```

writes a table of the number in every format of ``snippets/number_formats.py``, widest
first, and the formats themselves as JSON. ``_static/explorer.js`` puts the controls in
front of it, with the lines of the body as examples, and from then on writes the cells.
``tests/test_explorer.py`` checks that both write the same.
"""

from collections.abc import Iterator
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Decimal, localcontext
from html import escape
from pathlib import Path
from typing import ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata, OptionSpec
from widgets import connect, place

from snippets import number_formats
from snippets.number_formats import FORMATS, FloatFormat, decode, encode

__all__ = ["NumberExplorer", "Row", "rows", "setup", "written"]

_CLASS = "hb-explorer"
_HEAD = ("Format", "Bits", "Value", "Error", "Relative")
_FIELDS = ("sign", "exponent", "mantissa")
_MINUS = "\N{MINUS SIGN}"


class Row(NamedTuple):
    """A number in a format: what the table shows of it."""

    fmt: FloatFormat
    code: int
    value: float
    what: str  # "exact" or "rounded", and whether subnormal
    error: float

    @property
    def fields(self) -> tuple[str, str, str]:
        """The bits of sign, exponent and mantissa."""
        bits = f"{self.code % 2**self.fmt.bits:0{self.fmt.bits}b}"
        cut = self.fmt.has_sign + self.fmt.exponent_bits
        return bits[: self.fmt.has_sign], bits[self.fmt.has_sign : cut], bits[cut:]


def widest_first() -> list[FloatFormat]:
    """Return the formats in the order of the table."""
    return sorted(FORMATS.values(), key=lambda fmt: -fmt.bits)


def rows(number: float) -> Iterator[Row]:
    """Round a number to every format.

    Yields:
        What the table shows of each.

    Raises:
        ValueError: A format cannot hold it but as zero, Inf or its largest number: that
            takes more words than stand in a table without a script.
    """
    for fmt in widest_first():
        code = encode(number, fmt)
        value = decode(code, fmt).item()
        if not 0 < value < number_formats.finfo(fmt).max:
            msg = f"{number!r} becomes {value!r} in {fmt.name}: take a plainer number"
            raise ValueError(msg)
        what = "exact" if value == number else "rounded"
        if fmt.has_zero and value < number_formats.finfo(fmt).smallest_normal:
            what += ", subnormal"
        yield Row(fmt, int(code), value, what, value - number)


def written(number: float) -> str:
    """Write an error: three digits, ties up as JavaScript has them, with a sign."""
    if number == 0:
        return "0"
    with localcontext(rounding=ROUND_HALF_UP):
        size = Decimal(abs(number))
        head, power = f"{size:.2e}".split("e")
        e = int(power)
        plain = f"{size:.{2 - e}f}" if -4 <= e < 3 else f"{head}e{e}"
    return (_MINUS if number < 0 else "+") + plain.replace("e-", f"e{_MINUS}")


def _relative(row: Row, number: float) -> str:
    """Write a ratio: in percent unless it is tiny."""
    relative = row.error / number
    if relative == 0 or not 1e-4 <= abs(relative) < 10:
        return written(relative)
    return f"{written(100 * relative)}%"


class NumberExplorer(SphinxDirective):
    """The explorer; a number or format that there is not is an error of the build."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[OptionSpec] = {"format": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the table and the data as HTML; other builders leave it out."""
        for file in (number_formats.__file__, __file__):
            self.env.note_dependency(str(Path(file)))
        number, name = self.arguments[0], self.options.get("format", "")
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise self.error(f"number-explorer needs a :format: of {known}; got {name}")
        try:
            table = _table(number, name)
            examples = [_example(line) for line in self.content if line.strip()]
        except ValueError as error:
            msg = f"number-explorer {number}: {error}"
            raise self.error(msg) from error
        data = {
            "number": number,
            "format": name,
            "formats": [asdict(fmt) for fmt in widest_first()],
            "examples": examples,
        }
        hint = (
            "To type a number of your own, switch JavaScript on: the explorer is a"
            " script of this site."
        )
        return [place("explorer", data, hint, table)]


def _example(line: str) -> dict[str, str]:
    """Read ``number | format | why``.

    Raises:
        ValueError: It is not that.
    """
    parts = [part.strip() for part in line.split("|")]
    if len(parts) != 3 or not all(parts) or parts[1] not in FORMATS:
        msg = f"an example is 'number | format | why', got {line!r}"
        raise ValueError(msg)
    return dict(zip(("x", "format", "why"), parts, strict=True))


def _table(number: str, chosen: str) -> str:
    # A phone lays rows out as blocks, and a block is no row but for its role.
    words = [_code(("±", *_FIELDS[1:])) if word == "Bits" else word for word in _HEAD]
    head = "".join(f'<th scope="col" role="columnheader">{word}</th>' for word in words)
    body = "".join(_row(row, float(number), chosen) for row in rows(float(number)))
    return (
        f'<table class="{_CLASS}__all" role="table">'
        f"<caption>{escape(number)} in every format, rounded to nearest, saturating"
        "</caption>"
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _row(row: Row, number: float, chosen: str) -> str:
    def part(name: str, text: str) -> str:
        return f'<span class="{_CLASS}__{name}">{text}</span>'

    cells = (
        _code(row.fields),
        f"{part('value', repr(row.value))} {part('what', row.what)}",
        part("error", written(row.error)),
        part("relative", _relative(row, number)),
    )
    data = "".join(
        f'<td role="cell" data-head="{head}">{cell}</td>'
        for head, cell in zip(_HEAD[1:], cells, strict=True)
    )
    marked = f' class="{_CLASS}__chosen"' if row.fmt.name == chosen else ""
    return (
        f'<tr role="row" data-format="{row.fmt.name}"{marked}>'
        f'<th scope="row" role="rowheader">{row.fmt.name}</th>{data}</tr>'
    )


def _code(fields: tuple[str, ...]) -> str:
    """Write what stands in the columns of the three fields."""
    spans = " ".join(
        f'<span class="{_CLASS}__{name} {name}">{field}</span>'
        for name, field in zip(_FIELDS, fields, strict=True)
    )
    return f'<span class="{_CLASS}__code">{spans}</span>'


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive."""
    app.add_directive("number-explorer", NumberExplorer)
    connect(app, "explorer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
