"""Charts that are drawn from recorded numbers while the site is built.

.. code-block:: md

   ```{chart} ../../benchmarks/fp8_training.json
   :title: Training loss of a small GPT
   :label: All lines but one fall together; without scales the loss stays above.
   :x: steps = training step
   :y: loss, nats a character
   FP32 = runs/FP32/loss
   no scales = runs/no scales/loss
   ```

draws a line for each series of the body, ``name = path``; a path leads through the
objects and lists of the JSON file. The chart is inline SVG without a script: its
colors are the site's variables, so it follows the theme, and every line has a dash of
its own, so it does not depend on color. ``tests/test_figures.py`` checks it.

Options:

``title``, ``label``
    What the chart is, and in a sentence what it shows: for those who do not see it.
``x``
    ``path = text``: where the positions are, and what the axis says. Without a path
    the positions are 1, 2, 3 ...
``y``
    What the vertical axis says.
``kind``
    ``lines``; ``steps``, a histogram, whose positions are the edges of the bins, one
    more than values; ``ticks``, a row of marks for each series, whose values are the
    positions.
``log``
    ``x``, ``y`` or ``x y``: axes that are logarithmic.
``x-range``, ``y-range``
    Two numbers; without them an axis holds all of the data.
``spans``
    ``name from to; ...``: parts of the horizontal axis, marked above the data.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata, OptionSpec

__all__ = ["Axis", "Chart", "setup", "ticks_of"]

KINDS = ("lines", "steps", "ticks")
# The page and the plot in it, in the units of the drawing: the style sheet makes the
# letters larger on a phone, where a unit is half as long, and they must still fit.
WIDTH, HEIGHT = 640, 372
LEFT, RIGHT, TOP, BOTTOM = 86, 34, 44, 76
PLOT = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
SPAN = 30  # the height of a marked part of the axis
DASHES = ("", "9 4", "2 3", "12 3 2 3", "5 2", "1 5", "14 5", "7 2 2 2 2 2")
MOST_TICKS = 6


class Axis(NamedTuple):
    """From where to where an axis goes, and whether by factors."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value is, from 0 at the low end to 1 at the high one."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def ticks_of(axis: Axis) -> list[float]:
    """Return at most six round numbers on the axis, and at least two.

    Steps are 1, 2, 2.5 or 5 times a power of ten; of an axis by factors they are
    powers of ten, or where it is short 1, 2 and 5 times such.
    """
    if axis.log:
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        for heads in ((1, 2, 5), (1, 3), (1,)):
            found = [h * 10.0**e for e in range(first, last + 1) for h in heads]
            found = _within(found, axis)
            if len(found) <= MOST_TICKS:
                break
        if len(found) >= 2:
            return found[:: -(-len(found) // MOST_TICKS)]
    power = 10.0 ** math.floor(math.log10(axis.high - axis.low) - 1)
    for step in (1, 2, 2.5, 5, 10, 20, 25, 50):
        unit = step * power
        numbers = range(
            math.ceil(axis.low / unit - 1e-9), math.floor(axis.high / unit + 1e-9) + 1
        )
        if len(numbers) <= MOST_TICKS:
            break
    return [number * unit for number in numbers]


def _within(values: Sequence[float], axis: Axis) -> list[float]:
    return [v for v in values if -1e-9 <= axis.place(v) <= 1 + 1e-9]


def _said(value: float) -> str:
    """Write the number of a tick, with a real minus."""
    if value and not 1e-3 <= abs(value) < 1e5:
        head, power = f"{value:.0e}".split("e")
        text = f"{'' if head == '1' else head + '·'}10{_raised(int(power))}"
    else:
        text = f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


class _Series(NamedTuple):
    name: str
    values: list[float]


class Chart(SphinxDirective):
    """A chart; what does not fit the data is an error of the build."""

    has_content = True
    required_arguments = 1
    option_spec: ClassVar[OptionSpec] = {
        "title": directives.unchanged_required,
        "label": directives.unchanged_required,
        "x": directives.unchanged_required,
        "y": directives.unchanged,
        "kind": lambda given: directives.choice(given, KINDS),
        "log": directives.unchanged_required,
        "x-range": directives.unchanged_required,
        "y-range": directives.unchanged_required,
        "spans": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Return the chart as HTML; other builders leave it out."""
        for needed in ("title", "label", "x"):
            if not self.options.get(needed):
                msg = f"a chart needs a :{needed}:"
                raise self.error(msg)
        _, name = self.env.relfn2path(self.arguments[0])
        for file in (name, __file__):
            self.env.note_dependency(str(Path(file)))
        try:
            record = json.loads(Path(name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            msg = f"cannot read {self.arguments[0]}: {error}"
            raise self.error(msg) from error
        try:
            html = self._draw(record)
        except (LookupError, TypeError, ValueError) as error:
            msg = f"cannot draw {self.options['title']!r}: {error}"
            raise self.error(msg) from error
        return [nodes.raw("", html, format="html")]

    def _draw(self, record: Any) -> str:
        kind = self.options.get("kind", "lines")
        path, x_text = _pair(self.options["x"])
        series = [
            _Series(name, _numbers(record, where))
            for name, where in (_pair(line) for line in self.content if line.strip())
        ]
        if not series:
            raise ValueError("it has no series, one a line: name = path")
        x = _numbers(record, path) if path else []
        if not path and kind == "lines":
            x = [float(i + 1) for i in range(max(len(s.values) for s in series))]
        for one in series:
            wanted = len(x) - (kind == "steps")
            if kind != "ticks" and len(one.values) != wanted:
                msg = f"{one.name} has {len(one.values)} values for {wanted} positions"
                raise ValueError(msg)
        every = [value for one in series for value in one.values]
        if kind == "ticks":
            x, every = every, [0.0, 1.0]
        spans = _spans(self.options.get("spans", ""))
        ends = [end for _, low, high in spans for end in (low, high)]
        logs = self.options.get("log", "").split()
        if set(logs) - {"x", "y"}:
            msg = f":log: takes x, y or both, got {' '.join(logs)!r}"
            raise ValueError(msg)
        h = _axis([*x, *ends], "x" in logs, self.options.get("x-range"), 0)
        more = [0.0] if kind == "steps" else []
        room = 0 if kind == "ticks" else 0.04
        v = _axis([*every, *more], "y" in logs, self.options.get("y-range"), room)
        draw = {"lines": _lines, "steps": _steps, "ticks": _rows}[kind]
        marks = draw(x, series, h, v, SPAN * len(spans))
        return _page(
            title=self.options["title"],
            label=self.options["label"],
            names=[one.name for one in series],
            number=self.env.new_serialno("chart"),
            plot=_spans_drawn(spans, h) + marks,
            frame=_frame(h, v if kind != "ticks" else None, SPAN * len(spans))
            + _words(x_text, self.options.get("y", "")),
        )


# ------------------------------------------------------------------------- the options


def _pair(line: str) -> tuple[str, str]:
    """Split ``name = path`` at its last equals sign."""
    first, _, last = line.rpartition("=")
    return first.strip(), last.strip()


def _numbers(record: Any, path: str) -> list[float]:
    """Return the list of numbers that a path leads to; null is NaN, a gap.

    Raises:
        LookupError: The path leads nowhere.
        TypeError: It leads to something else.
    """
    here = record
    for step in path.split("/"):
        try:
            here = here[int(step) if isinstance(here, list) else step]
        except (LookupError, TypeError, ValueError):
            known = f"; here are: {', '.join(here)}" if isinstance(here, dict) else ""
            msg = f"no {step!r} on the way {path!r}{known}"
            raise LookupError(msg) from None
    if not isinstance(here, list) or not here:
        msg = f"{path!r} is not a list of numbers"
        raise TypeError(msg)
    return [math.nan if value is None else float(value) for value in here]


def _spans(text: str) -> list[tuple[str, float, float]]:
    found = []
    for part in filter(str.strip, text.split(";")):
        *name, low, high = part.split()
        found.append((" ".join(name), float(low), float(high)))
    return found


def _axis(values: list[float], log: bool, given: str | None, room: float) -> Axis:
    """Return the axis that holds the values, or the given range.

    Raises:
        ValueError: There is nothing between its ends, or no logarithm of one.
    """
    finite = [value for value in values if math.isfinite(value)]
    if given:
        low, high = (float(end) for end in given.split())
    elif not finite:
        raise ValueError("it has no finite number")
    else:
        low, high = min(finite), max(finite)
        if low == high and room:  # a flat line, which stands in the middle
            low, high = (low / 2, 2 * high) if log else (low - 1, high + 1)
    if log and low <= 0:
        msg = f"a logarithmic axis cannot begin at {low:g}"
        raise ValueError(msg)
    if not low < high:
        msg = f"an axis cannot go from {low:g} to {high:g}"
        raise ValueError(msg)
    if not given and log:
        factor = (high / low) ** room
        low, high = low / factor, high * factor
    elif not given:
        width = room * (high - low)
        low, high = (low - width if low else low), high + width
    return Axis(low, high, log)


# ------------------------------------------------------------------------- the drawing


def _at(axis: Axis, value: float) -> float:
    return PLOT[0] * axis.place(value)


def _up(axis: Axis, value: float, top: float) -> float:
    return PLOT[1] - (PLOT[1] - top) * axis.place(value)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Write a line through points; None lifts the pen."""
    text, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            text.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            pen = "L"
    return "".join(text)


def _style(index: int) -> str:
    dash = DASHES[index % len(DASHES)]
    return f'class="hb-chart__{index % 6}"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _lines(x: list[float], series: list[_Series], h: Axis, v: Axis, top: float) -> str:
    drawn = []
    for index, one in enumerate(series):
        points = [
            (_at(h, place), _up(v, value, top))
            if math.isfinite(value) and (value > 0 or not v.log)
            else None
            for place, value in zip(x, one.values, strict=True)
        ]
        drawn.append(f'<path {_style(index)} d="{_path(points)}"/>')
    return "".join(drawn)


def _steps(x: list[float], series: list[_Series], h: Axis, v: Axis, top: float) -> str:
    drawn = []
    for index, one in enumerate(series):
        points = [(_at(h, x[0]), float(PLOT[1]))]
        for left, right, value in zip(x[:-1], x[1:], one.values, strict=True):
            points += [(_at(h, end), _up(v, value, top)) for end in (left, right)]
        points.append((_at(h, x[-1]), float(PLOT[1])))
        drawn.append(f'<path filled {_style(index)} d="{_path(points)}"/>')
    return "".join(drawn).replace(
        '<path filled class="', '<path class="hb-chart__filled '
    )


def _rows(_x: list[float], series: list[_Series], h: Axis, _v: Axis, top: float) -> str:
    row = (PLOT[1] - top) / len(series)
    drawn = []
    for index, one in enumerate(series):
        low = top + (index + 1) * row - 6
        places = [
            _at(h, value)
            for value in one.values
            if math.isfinite(value) and (value > 0 or not h.log)
        ]
        marks = "".join(f"M{place:.1f} {low:.1f}v{-0.55 * row:.1f}" for place in places)
        drawn.append(f'<path class="hb-chart__{index % 6}" d="{marks}"/>')
        drawn.append(
            f'<text x="4" y="{low - 0.62 * row:.1f}">{escape(one.name)}</text>'
        )
    return "".join(drawn)


def _spans_drawn(spans: Sequence[tuple[str, float, float]], h: Axis) -> str:
    drawn = []
    for index, (name, low, high) in enumerate(spans):
        left, right, y = _at(h, low), _at(h, high), SPAN * index
        drawn.append(
            f'<rect class="hb-chart__span" x="{left:.1f}" y="{y + 2}" '
            f'width="{right - left:.1f}" height="{SPAN - 5}"/>'
            f'<text x="{(left + right) / 2:.1f}" y="{y + SPAN - 9}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    return "".join(drawn)


def _frame(h: Axis, v: Axis | None, top: float) -> str:
    """Draw the two axes with their numbers and, across the plot, faint lines."""
    bottom, right = TOP + PLOT[1], LEFT + PLOT[0]
    drawn = [f'<path class="hb-chart__axis" d="M{LEFT} {bottom}H{right}"/>']
    for value in ticks_of(h):
        x = LEFT + _at(h, value)
        drawn.append(f'<path class="hb-chart__axis" d="M{x:.1f} {bottom}v5"/>')
        drawn.append(
            f'<text x="{x:.1f}" y="{bottom + 24}" text-anchor="middle">'
            f"{_said(value)}</text>"
        )
    for value in ticks_of(v) if v else []:
        y = TOP + _up(v, value, top) if v else 0
        drawn.append(f'<path class="hb-chart__grid" d="M{LEFT} {y:.1f}H{right}"/>')
        drawn.append(
            f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">'
            f"{_said(value)}</text>"
        )
    return "".join(drawn)


def _words(x: str, y: str) -> str:
    across = f'<text x="{LEFT + PLOT[0] / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
    up = f'<text x="6" y="24">{escape(y)}</text>' if y else ""
    return f"{across}{escape(x)}</text>{up}"


def _page(
    *, title: str, label: str, names: list[str], number: int, plot: str, frame: str
) -> str:
    """Put the drawing, its title and description, and the legend together."""
    own = f"hb-chart-{number}"
    legend = "".join(
        '<li><svg viewBox="0 0 34 10" aria-hidden="true" focusable="false">'
        f'<path {_style(index)} d="M1 5H33"/></svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return (
        '<figure class="hb-chart">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{own}-title {own}-label">'
        f'<title id="{own}-title">{escape(title)}</title>'
        f'<desc id="{own}-label">{escape(label)}</desc>'
        f"{frame}"
        f'<svg x="{LEFT}" y="{TOP}" width="{PLOT[0]}" height="{PLOT[1]}" '
        f'overflow="hidden">{plot}</svg></svg>'
        f"<figcaption><p>{escape(title)}</p>"
        f'<ul class="hb-chart__legend">{legend}</ul></figcaption></figure>'
    )


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the directive; the style is in ``_static/half-the-bits.css``."""
    app.add_directive("chart", Chart)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
