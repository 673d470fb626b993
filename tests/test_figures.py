"""Charts: what is drawn is what is recorded, for those who see it and who do not."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag
from figures import HEIGHT, LEFT, PLOT, WIDTH, Axis, ticks_of

ROOT = Path(__file__).parents[1]

CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "_ext")!r})
extensions = ["myst_parser", "figures"]
"""

RECORD = {
    "steps": [0, 10, 20, 30, 40],
    "runs": {
        "a <b>": {"loss": [4.0, 3.0, 2.0, 1.0, 0.0]},
        "with gap": {"loss": [1.0, 1.0, None, 2.0, 2.0]},
    },
    "edges": [0, 10, 40],
    "parts": [[25, 75], [100, 1000]],
    "codes": [0, 5, 40],
    "flat": [2, 2, 2, 2, 2],
}

Build = Callable[..., tuple[BeautifulSoup, str]]


def page(folder: Path, text: str) -> tuple[BeautifulSoup, str]:
    """Build a page beside the record; return it and the warnings."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "conf.py").write_text(CONF, "utf-8")
    (source / "record.json").write_text(json.dumps(RECORD), "utf-8")
    (source / "index.md").write_text(text, "utf-8")
    sphinx = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, folder / "html"],
        capture_output=True,
        text=True,
        check=True,
    )
    html = (folder / "html/index.html").read_text("utf-8")
    return BeautifulSoup(html, "html.parser"), sphinx.stderr


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that builds a page of one chart, given by its lines."""

    def run(*lines: str) -> tuple[BeautifulSoup, str]:
        chart = "\n".join(["```{chart} record.json", *lines, "```"])
        return page(tmp_path, f"# T\n\n{chart}\n")

    return run


TITLE = ":title: A & B"
LABEL = ":label: They <meet>."
X = ":x: steps = training step"


def figure(soup: BeautifulSoup) -> Tag:
    """Return the chart of the page."""
    found = soup.find("figure", class_="hb-chart")
    assert isinstance(found, Tag)
    return found


def points(soup: BeautifulSoup, series: int = 0) -> list[list[tuple[float, float]]]:
    """Return the points of a series as drawn, a list for each piece of the line."""
    plot = figure(soup).select("svg > svg")[0]
    line = plot.select("path")[series]["d"]
    pieces = re.findall(r"M[^M]+", str(line))
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", piece)]
        for piece in pieces
    ]


def words(soup: BeautifulSoup) -> list[str]:
    """Return all that stands in the drawing."""
    return [text.get_text() for text in figure(soup).select("text")]


def test_a_line_goes_through_its_numbers(build: Build) -> None:
    """Positions are linear in the data, and the first series falls from top to end."""
    soup, warnings = build(
        TITLE, LABEL, X, ":y-range: 0 4", "", "a <b> = runs/a <b>/loss"
    )

    assert not warnings
    ((line),) = points(soup)
    for i, (x, y) in enumerate(line):
        assert abs(x - PLOT[0] * i / 4) <= 0.05  # drawn to one decimal
        assert abs(y - PLOT[1] * i / 4) <= 0.05


def test_what_is_missing_is_a_gap(build: Build) -> None:
    """A null lifts the pen; nothing is drawn across it."""
    soup, _ = build(TITLE, LABEL, X, "", "g = runs/with gap/loss")

    assert [len(piece) for piece in points(soup)] == [2, 2]


def test_a_chart_can_be_read_without_being_seen(build: Build) -> None:
    """A title and a description, escaped, that the drawing is labelled by; a legend."""
    soup, _ = build(
        TITLE,
        LABEL,
        X,
        ":y: loss",
        "",
        "a <b> = runs/a <b>/loss",
        "= runs/with gap/loss",
    )
    svg = figure(soup).svg
    assert svg is not None
    named = [soup.find(id=name) for name in str(svg["aria-labelledby"]).split()]

    assert svg["role"] == "img"
    assert [tag.get_text() for tag in named if tag] == ["A & B", "They <meet>."]
    assert [tag.name for tag in named if tag] == ["title", "desc"]
    assert {"training step", "loss"} <= set(words(soup))
    assert [li.get_text() for li in figure(soup).select("li")] == ["a <b>", ""]
    assert not soup.select("figure script, figure [style], figure [fill]")


def test_lines_differ_by_their_dash_and_not_by_color_alone(build: Build) -> None:
    """No two of eight series look the same in black and white, in plot and legend."""
    series = ["a <b> = runs/a <b>/loss"] * 8
    soup, _ = build(TITLE, LABEL, X, "", *series)

    for paths in (
        figure(soup).select("svg > svg path"),
        figure(soup).select("li path"),
    ):
        dashes = [path.get("stroke-dasharray", "") for path in paths]
        assert len(set(map(str, dashes))) == 8


def test_a_histogram_stands_on_its_axis(build: Build) -> None:
    """Positions are edges: each value spans two, and the outline is closed below."""
    soup, warnings = build(
        TITLE,
        LABEL,
        ":kind: steps",
        ":x: edges = size",
        ":y-range: 0 100",
        "",
        "p = parts/0",
    )

    assert not warnings
    ((outline),) = points(soup)
    w, h = PLOT
    assert outline == [
        (0, h),
        (0, 0.75 * h),
        (w / 4, 0.75 * h),
        (w / 4, 0.25 * h),
        (w, 0.25 * h),
        (w, h),
    ]


def test_marks_of_a_row_stand_at_its_values(build: Build) -> None:
    """Each series is a row with its name, and the axis holds all of the values."""
    soup, warnings = build(
        TITLE, LABEL, ":kind: ticks", ":x: = value", "", "E2M1 = codes", "all = steps"
    )
    paths = figure(soup).select("svg > svg path")
    places = [
        [float(x) for x in re.findall(r"M([\d.]+)", str(path["d"]))] for path in paths
    ]

    assert not warnings
    assert places[0] == [0, PLOT[0] / 8, PLOT[0]]
    assert len(places[1]) == 5
    assert {"E2M1", "all"} <= set(words(soup))


def test_parts_of_the_axis_are_marked_above_the_data(build: Build) -> None:
    """A span is as long as what it marks, has its name, and the data keeps clear."""
    soup, _ = build(
        TITLE,
        LABEL,
        X,
        ":spans: E4M3 normal 10 30; E5M2 0 80",
        ":x-range: 0 80",
        "",
        "a = runs/a <b>/loss",
    )
    spans = figure(soup).select("rect")

    assert [float(str(s["x"])) for s in spans] == [PLOT[0] / 8, 0]
    assert [float(str(s["width"])) for s in spans] == [PLOT[0] / 4, PLOT[0]]
    assert {"E4M3 normal", "E5M2"} <= set(words(soup))
    lowest = max(float(str(s["y"])) + float(str(s["height"])) for s in spans)
    assert min(y for _, y in points(soup)[0]) >= lowest


def test_a_logarithmic_axis_is_linear_in_the_logarithm(build: Build) -> None:
    """1, 10, 100 stand at equal distances, with those numbers on the axis."""
    axis = Axis(1, 100, log=True)

    assert [axis.place(v) for v in (1, 10, 100)] == [0, 0.5, 1]
    assert [Axis(-2, 6).place(v) for v in (-2, 0, 6)] == [0, 0.25, 1]
    assert ticks_of(Axis(1, 10_000, log=True)) == [1, 10, 100, 1000, 10_000]
    soup, warnings = build(
        TITLE, LABEL, X, ":log: y", ":y-range: 0.1 10", "", "a = runs/a <b>/loss"
    )
    assert not warnings
    assert len(points(soup)[0]) == 4  # the last is zero, and has no logarithm
    assert {"0.1", "1", "10"} <= set(words(soup))


@pytest.mark.parametrize("log", [False, True], ids=["linear", "logarithmic"])
@pytest.mark.parametrize("width", [1e-6, 0.1, 1, 7, 9.99, 300, 1e7])
@pytest.mark.parametrize("low", [1e-7, 0.3, 1, 88, 12345])
def test_an_axis_has_few_round_numbers(low: float, width: float, log: bool) -> None:
    """Two to six, on the axis, in order, each with at most three digits of its step."""
    axis = Axis(low, low + width if not log else low * (1 + width * 10), log)
    ticks = ticks_of(axis)

    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)


def test_numbers_are_written_short_and_with_a_real_minus(build: Build) -> None:
    """Large and small powers of ten are written as powers."""
    soup, _ = build(
        TITLE, LABEL, X, ":y-range: -2 2", ":x-range: 0 4e6", "", "f = flat"
    )

    assert {"\N{MINUS SIGN}2", "10⁶", "2·10⁶", "0"} <= set(words(soup))


def test_letters_stay_in_the_drawing_on_a_phone(build: Build) -> None:
    """Numbers of the axis fit left of it in the style sheet's largest letters."""
    style = (ROOT / "_static/half-the-bits.css").read_text("utf-8")
    sizes = [
        int(n) for n in re.findall(r"\.hb-chart text \{[^}]*?font-size: (\d+)px", style)
    ]
    soup, _ = build(TITLE, LABEL, X, ":y: loss", "", "a = runs/a <b>/loss")
    numbers = figure(soup).select('text[text-anchor="end"]')

    assert len(sizes) == 2
    assert all(len(n.get_text()) * 0.6 * max(sizes) <= LEFT - 8 for n in numbers)
    assert all(0 < float(str(t["y"])) < HEIGHT for t in figure(soup).select("text"))
    svg = figure(soup).svg
    assert svg is not None
    assert svg["viewbox"] == f"0 0 {WIDTH} {HEIGHT}"


def test_what_does_not_fit_is_an_error_of_the_build(tmp_path: Path) -> None:
    """The error is located, and says what is missing or wrong."""
    senseless = [
        ((LABEL, X, "", "a = flat"), "needs a :title:"),
        ((TITLE, X, "", "a = flat"), "needs a :label:"),
        ((TITLE, LABEL, "", "a = flat"), "needs a :x:"),
        ((TITLE, LABEL, X), "no series"),
        ((TITLE, LABEL, X, "", "a = runs/b/loss"), "no 'b' on the way 'runs/b/loss'"),
        ((TITLE, LABEL, X, "", "a = runs"), "not a list of numbers"),
        ((TITLE, LABEL, X, "", "a = edges"), "a has 3 values for 5 positions"),
        ((TITLE, LABEL, X, ":log: z", "", "a = flat"), ":log: takes x, y or both"),
        ((TITLE, LABEL, X, ":log: x", "", "a = flat"), "cannot begin at 0"),
        ((TITLE, LABEL, X, ":y-range: 3 3", "", "a = flat"), "cannot go from 3 to 3"),
    ]
    text, places = "# T\n", []
    for lines, complaint in senseless:
        places.append((text.count("\n") + 2, complaint))
        text += "\n" + "\n".join(["```{chart} record.json", *lines, "```"]) + "\n"
    for file in ("nowhere.json", "conf.py"):
        places.append((text.count("\n") + 2, f"cannot read {file}"))
        chart = ["```{chart} " + file, TITLE, LABEL, X, "", "a = flat", "```"]
        text += "\n" + "\n".join(chart) + "\n"

    soup, warnings = page(tmp_path, text)

    for line, complaint in places:
        wanted = rf"index.md:{line}: ERROR: .*{re.escape(complaint)}"
        assert re.search(wanted, warnings), warnings
    assert soup.find("figure", class_="hb-chart") is None


def test_a_flat_line_is_drawn(build: Build) -> None:
    """Numbers that are all equal still have an axis."""
    soup, warnings = build(TITLE, LABEL, X, "", "a = flat")

    assert not warnings
    assert len({y for _, y in points(soup)[0]}) == 1


def test_no_tick_stands_left_of_an_axis_by_factors() -> None:
    """However far the ends are apart, what counts is the place, not the number."""
    ticks = ticks_of(Axis(3e-9, 1e3, log=True))

    assert min(ticks) > 3e-9
    assert all(0 <= Axis(3e-9, 1e3, log=True).place(tick) <= 1 for tick in ticks)
