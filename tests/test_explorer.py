"""Laws of the number format explorer: its arithmetic, its table, and its page.

The script's arithmetic is compared in Chromium with ``snippets/number_formats.py``, on
an empty page; what a reader does is tried on a page built from the directive of
``source/reference/explorer.md``, which is opened from the disk.
"""

import base64
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from bs4 import BeautifulSoup
from explorer import rows, written
from playwright.sync_api import Browser, BrowserContext, Locator, Page
from torch import Tensor

from snippets.number_formats import (
    FORMATS,
    FloatFormat,
    decode,
    encode,
    finfo,
    neighbours,
    round_to,
    table,
    ulp,
)
from tests.widget import (
    CLIPBOARD,
    DESK,
    PHONES,
    SCREENS,
    Widget,
    build,
    directive,
    load,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "_static/explorer.js"
ROUNDINGS = ("nearest", "toward_zero", "up", "down")
MODES = [
    (name, rounding, overflow)
    for name, rounding in itertools.product(FORMATS, ROUNDINGS)
    for overflow in ("saturate", "ieee")
    if FORMATS[name].nan_encoding or overflow == "saturate"
]
F64, INF, NAN = torch.float64, math.inf, math.nan
MINUS, DASH = "\N{MINUS SIGN}", "\N{EM DASH}"

browser_only = pytest.mark.browser


# --------------------------------------------------------- the directive, no browser

DIRECTIVE = directive("reference/explorer", "number-explorer")


def built_with(folder: Path, text: str, *, theme: bool = True) -> tuple[Path, str]:
    """Build a site of this page and one without an explorer."""
    pages = {"index": text, "plain": "# Plain\n"}
    return build(folder, pages, "explorer", theme=theme)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a built site whose first page has the explorer of the reference."""
    text = f"# Explorer\n\nText.\n\n{DIRECTIVE}\n\n## More\n\nText.\n"
    built, warnings = built_with(tmp_path_factory.mktemp("explorer"), text)

    assert not warnings
    return built


def shown(site: Path) -> BeautifulSoup:
    """Return the explorer as the page has it before any script runs."""
    soup = BeautifulSoup((site / "index.html").read_text("utf-8"), "html.parser")
    found = soup.select_one("div.hb-explorer")
    assert found
    return BeautifulSoup(str(found), "html.parser")


def test_the_script_has_the_formats_of_the_snippet(site: Path) -> None:
    """The page carries `FORMATS` whole, widest first: nothing is written twice."""
    script = shown(site).select_one("script")
    assert script
    data = json.loads(script.string or "")

    wanted = sorted(FORMATS.values(), key=lambda fmt: -fmt.bits)
    assert data["formats"] == [asdict(fmt) for fmt in wanted]
    assert data["format"] in FORMATS
    text = SCRIPT.read_text("utf-8")
    for name in set(FORMATS) - {"float64"}:
        assert name not in text, f"the script knows {name} by itself"


def test_the_table_without_a_script_is_number_formats(site: Path) -> None:
    """Each row is `encode` and `decode` of the number, with its errors."""
    soup = shown(site)
    text = soup.get_text(" ", strip=True)
    assert "switch JavaScript on" in text
    lines = soup.select("tbody tr")

    assert [line["data-format"] for line in lines] == [
        fmt.name for fmt in sorted(FORMATS.values(), key=lambda fmt: -fmt.bits)
    ]
    for line in lines:
        name = str(line["data-format"])
        code, value = encode(0.3, name), round_to(0.3, name).item()
        cells = [cell.get_text(" ", strip=True) for cell in line.select("td")]
        bits = f"{code.item() % 2 ** FORMATS[name].bits:0{FORMATS[name].bits}b}"
        assert cells[0].replace(" ", "") == bits
        assert float(cells[1].split()[0]) == value
        assert number(cells[2]) == pytest.approx(value - 0.3, rel=0.005, abs=0)
        assert number(cells[3]) == pytest.approx((value - 0.3) / 0.3, rel=0.005, abs=0)


def number(text: str) -> float:
    """Read an error as the table writes it; NaN for a dash."""
    plain = text.replace(MINUS, "-")
    if plain == DASH:
        return NAN
    return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)


def test_rows_say_what_happened() -> None:
    """A value is exact or rounded, and subnormal where its exponent field is 0."""
    found = {row.fmt.name: row for row in rows(0.3)}

    assert found["float64"].what == "exact"
    assert found["float8_e4m3fn"].what == "rounded"
    assert found["float6_e2m3fn"].what == "rounded, subnormal"
    assert found["float8_e8m0fnu"].what == "rounded"
    assert found["float8_e8m0fnu"][1:3] == (125, 0.25)
    assert found["float8_e8m0fnu"].fields == ("", "01111101", "")
    assert found["float8_e5m2"].fields == ("0", "01101", "01")


def test_errors_are_written_with_three_digits_and_a_sign() -> None:
    """Plain from 1e-4 to below 1000, else with a power; a minus is a minus sign."""
    cases = {
        0.0: "0",
        0.0125: "+0.0125",
        -0.0125: f"{MINUS}0.0125",
        999.4: "+999",
        999.6: "+1.00e3",
        1e-4: "+0.000100",
        9.999e-5: "+0.000100",
        9.99e-5: f"+9.99e{MINUS}5",
        -1.5e300: f"{MINUS}1.50e300",
    }

    assert {value: written(value) for value in cases} == cases


def test_script_and_style_load_with_the_explorer_only(site: Path) -> None:
    """Pages without one do not pay for it, and it waits for the page."""
    text = (site / "index.html").read_text("utf-8")

    assert re.search(r'<script defer="defer" src="_static/explorer\.js[^"]*">', text)
    assert re.search(r'href="_static/explorer\.css[^"]*"', text)
    assert "explorer." not in (site / "plain.html").read_text("utf-8")


def test_what_makes_no_sense_is_a_located_error(tmp_path: Path) -> None:
    """A number that a format does not hold, an unknown format, an odd example."""
    senseless = [
        ("0.3\n:format: float9", "needs a :format: of float64, .*; got float9"),
        ("0.3", "needs a :format: of"),
        ("word\n:format: float16", "could not convert string to float"),
        ("1e9\n:format: float16", "1000000000.0 becomes 65504.0 in float16"),
        ("1e-9\n:format: float16", "1e-09 becomes 0.0 in float16"),
        ("0.3\n:format: float16\n\n1 | float16", "an example is 'number | format"),
        ("0.3\n:format: float16\n\n1 | no | why", "an example is 'number | format"),
    ]
    text = "".join(f"\n```{{number-explorer}} {case}\n```\n" for case, _ in senseless)
    _, warnings = built_with(tmp_path, f"# T\n{text}", theme=False)

    for line in range(len(senseless)):
        complaint = senseless[line][1]
        assert re.search(rf"index\.md:\d+: ERROR: .*{complaint}", warnings), warnings
    assert warnings.count("ERROR") == len(senseless)


def test_an_example_cannot_end_the_script(tmp_path: Path) -> None:
    """What an example says stays data, whatever it says."""
    lines = "0.3\n:format: float16\n\n1 | float16 | </script><b>bold</b>"
    built, _ = built_with(
        tmp_path, f"# T\n\n```{{number-explorer}} {lines}\n```\n", theme=False
    )
    script = shown(built).select_one("script")
    assert script

    assert json.loads(script.string or "")["examples"][0]["why"].startswith("</script>")


# --------------------------------------------------------- the arithmetic


# Numbers go there and back as the 64 bits that they are.
HELPERS = """() => {
    const E = globalThis.E = halfTheBitsExplorer;
    globalThis.fromText = (text) => new BigUint64Array(
        Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
    globalThis.toText = (numbers) => {
        const bytes = new Uint8Array(numbers.buffer);
        let text = "";
        for (let i = 0; i < bytes.length; i += 8192)
            text += String.fromCharCode(...bytes.subarray(i, i + 8192));
        return btoa(text);
    };
    globalThis.each = ([format, data, name, index, ...more]) => {
        const f = E.makeFormat(format);
        const call = index === null ? (x) => E[name](x, f, ...more)
                                    : (x) => E[name](x, f, ...more)[index];
        return toText(fromText(data).map(call));
    };
}"""

Each = Callable[..., Tensor]


@pytest.fixture(scope="module")
def blank(browser: Browser) -> Iterator[Page]:
    """Load the script into an empty page.

    Yields:
        The page.
    """
    page = load(browser, "explorer")
    page.evaluate(HELPERS)
    yield page
    page.close()


@pytest.fixture(scope="module")
def each(blank: Page) -> Each:
    """Return a function that calls one of the script's for every number of a tensor."""

    def run(
        fmt: FloatFormat, x: Tensor, name: str, *more: str, at: int | None = None
    ) -> Tensor:
        sent = base64.b64encode(x.contiguous().numpy().tobytes()).decode()
        found = blank.evaluate("a => each(a)", [asdict(fmt), sent, name, at, *more])
        return torch.frombuffer(bytearray(base64.b64decode(found)), dtype=torch.int64)

    return run


def step(x: Tensor, toward: float) -> Tensor:
    """Return the next float64."""
    return torch.nextafter(x, torch.full_like(x, toward))


def around(points: Tensor) -> Tensor:
    """Return points, the float64 on either side of each, all of both signs."""
    points = torch.cat([points, step(points, -INF), step(points, INF)])
    return torch.cat([points, -points])


def edges(fmt: FloatFormat) -> Tensor:
    """Return where a format ends: overflow, the smallest numbers, what is special."""
    info = finfo(fmt)
    last, least = info.max, info.smallest_subnormal
    half = ulp(last, fmt).item() / 2
    tiny = [least * part for part in (0.25, 0.5, 0.75, 1.0, 1.5)]
    normal = [info.smallest_normal, info.smallest_normal - least / 2]
    points = [last, last + half, last + 2 * half, 2 * last, 1e308, *tiny, *normal]
    points += [0.0, 1.0, 0.3, 5e-324, torch.finfo(F64).tiny, torch.finfo(F64).max, INF]
    return torch.tensor(points, dtype=F64)


def probes(fmt: FloatFormat) -> Tensor:
    """Return every value or thousands, halfway points, a step either side, the edges.

    Formats of up to 16 bits: all values and all halfway points. Wider ones: 4,000
    random values, a quarter of them subnormal, what lies halfway to the next, and 4,000
    random float64 patterns, NaNs among them.
    """
    if fmt.bits <= 16:
        values = table(fmt)
        values = torch.unique(values[values.isfinite() & (values >= 0)])
        halves = (values[1:] + values[:-1]) / 2
        return around(torch.cat([values, halves, edges(fmt)]))
    generator = torch.Generator().manual_seed(fmt.bits)
    ranks = torch.randint(fmt.max_code, (4000,), generator=generator)
    ranks[:1000] %= 1 << fmt.mantissa_bits
    values = decode(ranks, fmt)
    halves = values + ulp(values, fmt) / 2  # in float64 itself, the next value
    high = torch.iinfo(torch.int64).max
    patterns = torch.randint(-high, high, (4000,), generator=generator).view(F64)
    return torch.cat([around(torch.cat([values, halves, edges(fmt)])), patterns])


def bits_of(x: Tensor) -> Tensor:
    """Return the patterns of float64, with one for every NaN."""
    return x.masked_fill(x.isnan(), NAN).view(torch.int64)


@browser_only
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_decoded_as_in_python(name: str, each: Each) -> None:
    """All codes of up to 16 bits, 20,000 of wider formats; the sign of NaN as well."""
    fmt = FORMATS[name]
    if fmt.bits <= 16:
        codes = torch.arange(1 << fmt.bits)
    else:
        generator = torch.Generator().manual_seed(0)
        high = min(1 << fmt.bits, 2**63 - 1)
        codes = torch.randint(high, (10_000,), generator=generator)
        codes = torch.cat([codes, encode(probes(fmt), fmt, overflow="ieee")])
        codes = torch.cat([codes, -codes]) if fmt.bits == 64 else codes

    found = each(fmt, codes, "decode")

    assert torch.equal(found, decode(codes, fmt).view(torch.int64))


@browser_only
@pytest.mark.parametrize(("name", "rounding", "overflow"), MODES)
def test_numbers_are_encoded_as_in_python(
    name: str, rounding: str, overflow: str, each: Each
) -> None:
    """Halfway points, one float64 either side, edges, ±0, Inf; NaN with its sign.

    Of the 16-bit formats all of these when rounding to nearest, else every fifth.
    """
    fmt = FORMATS[name]
    x = probes(fmt)
    x = x[:: 5 if fmt.bits == 16 and rounding != "nearest" else 1]
    if fmt.nan_encoding is None:
        x = x[~x.isnan()]
    else:
        nans = [0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, -1, -0x7FFFFFFFFFFFF]
        x = torch.cat([x, torch.tensor(nans).view(F64)])

    found = each(fmt, x, "encode", rounding, overflow)

    wanted = encode(x, fmt, rounding, overflow)
    wrong = found != wanted
    assert not wrong.any(), [x[wrong][:5], found[wrong][:5], wanted[wrong][:5]]
    assert len(x) > (100 if fmt.bits < 8 else 1000)


@browser_only
@pytest.mark.parametrize("name", FORMATS)
def test_neighbors_and_steps_are_those_of_python(name: str, each: Each) -> None:
    """The values on either side and the ulp, of every value and between them."""
    fmt = FORMATS[name]
    x = torch.cat([probes(fmt), torch.tensor([NAN, -NAN])])
    if fmt.bits == 16:
        x = x[::7]

    for index, wanted in enumerate(neighbours(x, fmt)):
        found = each(fmt, x, "neighbours", at=index)
        assert torch.equal(found, bits_of(wanted)), index
    assert torch.equal(each(fmt, x, "ulp"), bits_of(ulp(x, fmt)))


@browser_only
@pytest.mark.parametrize("name", FORMATS)
def test_limits_are_those_of_python(name: str, blank: Page) -> None:
    """The largest, the smallest normal and the smallest number of each format."""
    info = finfo(name)
    found = blank.evaluate(
        """f => Object.fromEntries(Object.entries(E.finfo(E.makeFormat(f)))
            .map(([name, bits]) => [name, E.toNumber(bits)]))""",
        asdict(FORMATS[name]),
    )

    assert found == {key: getattr(info, key) for key in found}
    assert len(found) == 3


@browser_only
def test_what_python_refuses_the_script_refuses(blank: Page) -> None:
    """No NaN and no "ieee" in a format without NaN; no unknown rounding or overflow."""
    cases = [
        ("float4_e2m1fn", "nearest", "ieee", 1.0, "has no Inf or NaN"),
        ("float6_e3m2fn", "nearest", "saturate", NAN, "has no NaN"),
        ("float16", "up or down", "saturate", 1.0, "rounding must be one of nearest"),
        ("float16", "toString", "saturate", 1.0, "rounding must be one of nearest"),
        ("float16", "nearest", "wrap", 1.0, "overflow must be one of saturate"),
    ]
    for name, rounding, overflow, x, message in cases:
        said = blank.evaluate(
            """([f, x, ...more]) => {
                try { E.encode(E.toBits(x), E.makeFormat(f), ...more); }
                catch (error) { return error.message; }
            }""",
            [asdict(FORMATS[name]), x, rounding, overflow],
        )

        assert message in said
        with pytest.raises(ValueError, match=r"has no|must be one of"):
            encode(x, name, rounding, overflow)


# --------------------------------------------------------- reading and writing


def read(blank: Page, texts: list[str], name: str = "float8_e4m3fn") -> list[Any]:
    """Return the float64 patterns that the script reads, or what it complains of."""
    found: list[Any] = blank.evaluate(
        """([format, texts]) => {
            const f = E.makeFormat(format);
            return texts.map((text) => {
                try {
                    const { bits, code, exact } = E.read(text, f);
                    return [String(bits), code === null ? null : String(code), exact];
                } catch (error) { return error.message; }
            });
        }""",
        [asdict(FORMATS[name]), texts],
    )
    return found


def pattern(x: float) -> str:
    """Return the 64 bits of a number as the script's integer; of NaN, the plain one."""
    number = NAN if math.isnan(x) else x
    return str(torch.tensor(number, dtype=F64).view(torch.int64).item() % 2**64)


@browser_only
def test_decimals_and_hexadecimal_floats_are_read_as_python_reads_them(
    blank: Page,
) -> None:
    """Thousands of random ones; halfway points of float64, and those beyond it."""
    random = torch.Generator().manual_seed(0)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=random))

    texts = ["1e308", "1.8e308", "-1e309", "5e-324", "2e-324", "2.5e-324", "1e-400"]
    texts += ["0", "-0", "-0.0", "0e5", "-1e-999", ".5", "5.", "9007199254740993"]
    texts += ["1.7976931348623158e308", "1.7976931348623159e308", "4.35", "0.1"]
    texts += ["2.2250738585072011e-308", "inf", "-INF", "nan", "Infinity", "+0.25"]
    for _ in range(3000):
        digits = str(pick(10 ** (1 + pick(18))))
        place = pick(len(digits) + 1)
        sign = "-" * pick(2)
        texts.append(
            f"{sign}{digits[:place]}.{digits[place:]}e{pick(660) - 330}".replace(
                ".e", ".0e"
            )
        )
    hexadecimal = [
        f"{'-' * pick(2)}0x{pick(16**5):x}.{pick(16**9):x}p{pick(2200) - 1100}"
        for _ in range(500)
    ]

    wanted = [*map(float, texts)]
    for text in hexadecimal:
        try:
            wanted.append(float.fromhex(text))
        except OverflowError:
            wanted.append(-INF if text[0] == "-" else INF)
    for text, x, found in zip(
        texts + hexadecimal, wanted, read(blank, texts + hexadecimal), strict=True
    ):
        assert found[:2] == [pattern(x), None], text
        if "." in text and "x" not in text and math.isfinite(x):
            assert found[2] == (Fraction(text) == Fraction(x)), text


@browser_only
def test_formulas_are_computed_exactly_and_rounded_once(blank: Page) -> None:
    """Thousands of them against fractions: Python's precedence, no step in between."""
    random = torch.Generator().manual_seed(1)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=random))

    def formula(depth: int) -> tuple[str, Fraction]:
        if depth == 0:
            kind = pick(3)
            if kind == 0:
                whole = pick(1000)
                return str(whole), Fraction(whole)
            if kind == 1:
                text = f"{pick(100)}.{pick(1000):03}"
                return text, Fraction(text)
            exponent = pick(61) - 30
            spelled = "**" if pick(2) else "^"
            return f"2{spelled}{exponent}", Fraction(2) ** exponent
        (left, a), (right, b) = formula(depth - 1), formula(pick(depth))
        op = "+-*/"[pick(4)]
        if op == "/" and b == 0:
            op = "+"
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[op]
        return f"({left} {op} {right})", value

    made = [formula(1 + pick(3)) for _ in range(2000)]
    made = [(text, value) for text, value in made if len(text) <= 200]
    made += [
        ("1/3", Fraction(1, 3)),
        ("-2^2", Fraction(-4)),
        ("2^-9", Fraction(1, 512)),
        ("2^3^2", Fraction(512)),
        ("2*-3", Fraction(-6)),
        (f"1 {MINUS} 2 \N{MULTIPLICATION SIGN} 3 · 4", Fraction(-23)),
        ("8/2/2", Fraction(2)),
        ("1-2-3", Fraction(-4)),
        ("1 + 2^-4 + 2^-40", 1 + Fraction(1, 16) + Fraction(1, 2**40)),
        ("3-3", Fraction(0)),
    ]
    for (text, value), found in zip(
        made, read(blank, [t for t, _ in made]), strict=True
    ):
        x = value.numerator / value.denominator  # rounded once, as CPython does
        assert found == [pattern(x), None, Fraction(x) == value], text
    assert read(blank, ["pi"]) == [[pattern(math.pi), None, False]]
    assert len(made) > 1500


@browser_only
def test_codes_are_read_in_the_chosen_format(blank: Page) -> None:
    """Hexadecimal and binary, spaced or not; NaN keeps its code."""
    texts = ["0x2a", "0X2A", "0b00101010", "0b0_0101_010", "0b0 0101 010", "0x7f"]
    found = read(blank, texts)

    assert found[:5] == [[pattern(0.3125), "42", True]] * 5
    assert found[5][1] == "127"
    nan = read(blank, ["0xffc1"], "float16")[0]
    assert nan[1] == str(0xFFC1)
    assert math.isnan(torch.tensor(int(nan[0]) - 2**64).view(F64).item())


@browser_only
def test_what_cannot_be_read_is_refused_in_words(blank: Page) -> None:
    """The message names what it got or why, and what is allowed; nothing hangs."""
    cases = {
        "": "There is no number. Type 0.3",
        "   ": "There is no number. Type 0.3",
        "word": "“word” is not a number. Type 0.3, 1e-8, 1/3, 2^-9",
        "1,5": "“1,5” is not a number.",
        "1e": "“1e” is not a number.",
        "1..2": "“1..2” is not a number.",
        "2 3": "“2 3” is not a number.",
        "2^": "“2^” is not a number.",
        "()": "“()” is not a number.",
        "(1": "“(1” is not a number.",
        "1)": "“1)” is not a number.",
        ".": "“.” is not a number.",
        "e5": "“e5” is not a number.",
        "0b2": "“0b2” is not a number.",
        "0x": "“0x” is not a number.",
        "<b>": "“<b>” is not a number.",
        "constructor": "“constructor” is not a number.",
        "0x1ff": "That code needs 9 bits; float8_e4m3fn has 8.",
        "0b100000000": "That code needs 9 bits; float8_e4m3fn has 8.",
        "1/0": "That divides by zero; write inf.",
        "1/(2-2)": "That divides by zero; write inf.",
        "0^-1": "That divides by zero; write inf.",
        "2^0.5": "An exponent must be a whole number.",
        "10^999999999": "An exponent must be from -5000 to 5000.",
        "1e999999999": "An exponent must be from -5000 to 5000.",
        "0x1p99999": "An exponent must be from -5000 to 5000.",
        "(10^5000)^5000": "That is too large to compute on the way.",
        "1" * 201: "That has 201 letters; 200 are the most.",
    }
    for text, found in zip(cases, read(blank, list(cases)), strict=True):
        assert isinstance(found, str), (text, found)
        assert found.replace(MINUS, "-").startswith(cases[text]), (text, found)
        if len(text) <= 200:
            assert "a code of float8_e4m3fn: 0x" in found


def read_power(text: str) -> Fraction:
    """Read ``5 · 2⁻⁴``, ``2³`` or ``7``; the integer is odd where a power follows."""
    found = re.fullmatch(
        r"(-?)(?:(\d+) · )?2([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text.replace(MINUS, "-")
    )
    if not found:
        return Fraction(int(text.replace(MINUS, "-")))
    sign, odd, power = found.groups()
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    assert int(odd or 1) % 2 == 1
    return Fraction(-1 if sign else 1) * int(odd or 1) * Fraction(2) ** exponent


@browser_only
def test_numbers_are_written_exactly(blank: Page) -> None:
    """The shortest decimal reads back; power and decimals are the number itself."""
    x = torch.cat([probes(FORMATS["float64"])[::40], probes(FORMATS["float16"])[::50]])
    x = x[x.isfinite()]
    sent = base64.b64encode(x.contiguous().numpy().tobytes()).decode()
    found = blank.evaluate(
        """data => [...fromText(data)].map((bits) =>
            [E.shortest(bits), E.asPower(bits), E.decimals(bits, 2000),
             E.decimals(bits, 40)])""",
        sent,
    )

    for number, (short, power, whole, cut) in zip(x.tolist(), found, strict=True):
        assert pattern(float(short)) == pattern(number)
        assert read_power(power) == Fraction(number)
        if whole is not None:
            assert Decimal(whole) == Decimal(number)
        if cut is not None and cut.endswith("…"):
            assert whole is None or whole.startswith(cut[:-1])
    special = blank.evaluate(
        "() => [Infinity, -Infinity, NaN, -0].map((x) => E.shortest(E.toBits(x)))"
    )
    assert special == ["inf", "-inf", "nan", "-0"]


@browser_only
def test_errors_are_written_as_without_a_script(blank: Page) -> None:
    """Both write three digits alike, so that the table is the same either way."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3000, dtype=F64, generator=generator)
    random *= torch.exp2(torch.randint(-60, 60, (3000,), generator=generator))
    numbers = [0.0, 999.6, 0.00009999, *random.tolist()]

    found = blank.evaluate("a => a.map((x) => E.threeDigits(x))", numbers)

    assert found == [written(x) for x in numbers]


def happened(x: Tensor, fmt: FloatFormat, rounding: str, overflow: str) -> list[str]:
    """Say in the explorer's words what becomes of numbers, from Python's results."""
    overflow = overflow if fmt.nan_encoding else "saturate"
    values = round_to(
        x if fmt.nan_encoding else x.nan_to_num(), fmt, rounding, overflow
    )
    pairs = zip(x.tolist(), values.tolist(), strict=True)
    return [in_words(number, value, fmt, rounding) for number, value in pairs]


def in_words(x: float, value: float, fmt: FloatFormat, rounding: str) -> str:
    """Say what it means that a number becomes a value."""
    info, last = finfo(fmt), finfo(fmt).max
    if math.isnan(x):
        return "NaN" if fmt.nan_encoding else "has no NaN"
    if x < 0 and not fmt.has_sign:
        return "has no negative numbers"
    if not math.isfinite(value):
        return "Inf" if value == x else "overflows"
    # It goes beyond if it is not the largest number that it is rounded to.
    beyond = 2 * Fraction(last) if math.isinf(x) else Fraction(abs(x)) - Fraction(last)
    size = Fraction(ulp(last, fmt).item())
    toward = rounding in {"toward_zero", "down" if x > 0 else "up"}
    limit = size if toward else size / 2 if rounding == "nearest" else Fraction(0)
    odd = fmt.mantissa_bits == 0 or fmt.max_code % 2 == 1
    tie_goes_up = toward or (rounding == "nearest" and odd)
    if abs(x) > last and (beyond > limit or (beyond == limit and tie_goes_up)):
        return "saturates"
    if x == 0 and value != 0:
        return "has no zero"
    if value == 0 and x != 0:
        return "underflows"
    if value == 0:
        same = math.copysign(1, value) == math.copysign(1, x)
        return "exact" if same else f"has no {MINUS}0"
    low = fmt.has_zero and abs(value) < info.smallest_normal
    return ("exact" if value == x else "rounded") + (", subnormal" if low else "")


@browser_only
@pytest.mark.parametrize("name", FORMATS)
def test_the_explorer_says_what_happened(name: str, blank: Page) -> None:
    """Exact, rounded, subnormal, underflow, overflow, saturation: as Python has it."""
    fmt = FORMATS[name]
    x = around(torch.cat([edges(fmt), torch.tensor([NAN], dtype=F64)]))
    sent = base64.b64encode(x.contiguous().numpy().tobytes()).decode()
    for rounding, overflow in itertools.product(ROUNDINGS, ("saturate", "ieee")):
        found = blank.evaluate(
            """([f, data, ...more]) => [...fromText(data)].map((x) =>
                E.look(x, E.makeFormat(f), ...more).what)""",
            [asdict(fmt), sent, rounding, overflow],
        )
        assert found == happened(x, fmt, rounding, overflow), (rounding, overflow)


@browser_only
@pytest.mark.parametrize("name", FORMATS)
def test_the_threshold_is_where_numbers_overflow(name: str, blank: Page) -> None:
    """Rounding to nearest: from or above the tie behind the largest number."""
    fmt = FORMATS[name]
    said = blank.evaluate(
        "([f, r]) => E.threshold(E.makeFormat(f), r)", [asdict(fmt), "nearest"]
    )
    if name == "float64":
        assert said == "float64 holds all that can be typed here"
        return
    word, _, text = said.partition(" ")
    tie = torch.tensor(float(text), dtype=F64)
    points = torch.stack([step(tie, 0.0), tie, step(tie, INF)])
    said_of = happened(points, fmt, "nearest", "saturate")

    assert [what == "saturates" for what in said_of] == [False, word == "from", True]
    assert word in {"from", "above"}


# --------------------------------------------------------- what a reader does


class Explorer(Widget):
    """The page with the explorer."""

    name = "explorer"

    @property
    def input(self) -> Locator:
        """What a reader types into."""
        return self.page.get_by_label("Number, or code of the format")

    @property
    def bits(self) -> str:
        """The bits as they are shown, checked against what their buttons say."""
        cells = self.page.locator(".hb-explorer__cells button").evaluate_all(
            """all => all.map((b) => [b.textContent, b.getAttribute("aria-pressed"),
                                      b.getAttribute("aria-label"), b.className])"""
        )
        for index, (bit, pressed, label, field) in enumerate(reversed(cells)):
            assert pressed == {"0": "false", "1": "true"}[bit]
            assert label == f"bit {index}, {field}, {bit}"
        return "".join(bit for bit, *_ in cells)

    @property
    def value(self) -> str:
        """The value in the chosen format, as it is shown."""
        return self.page.locator("strong.hb-explorer__value").inner_text()

    @property
    def table(self) -> dict[str, list[str]]:
        """The texts of the table: sign, exponent, mantissa, value, what, errors."""
        found: dict[str, list[str]] = self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll(
                ".hb-explorer tbody tr")].map((row) => [row.dataset.format,
                [...row.querySelectorAll("td span:not(:has(span))")]
                    .map((cell) => cell.textContent)]))"""
        )
        return found

    def fact(self, name: str) -> str:
        """One of the facts on the number in the chosen format."""
        row = self.page.locator(".hb-explorer__facts > div").filter(
            has=self.page.locator("dt", has_text=re.compile(f"^{name}$"))
        )
        return row.locator("dd").inner_text()


@pytest.fixture
def explorer(context: BrowserContext, site: Path) -> Iterator[Explorer]:
    """Open the explorer.

    Yields:
        The explorer; at the end nothing may have gone wrong on its page.
    """
    explorer = Explorer(context.new_page(), site / "index.html")
    yield explorer
    assert not explorer.wrong


@browser_only
def test_the_script_changes_nothing_in_the_table(
    explorer: Explorer, site: Path
) -> None:
    """The table is the same with and without the script, its caption too."""
    soup = shown(site)
    without = {
        str(row["data-format"]): [
            cell.get_text() for cell in row.select("td span") if not cell.select("span")
        ]
        for row in soup.select("tbody tr")
    }

    assert explorer.table == without
    caption = soup.select_one("caption")
    assert caption
    assert explorer.page.locator("caption").inner_text() == caption.get_text()
    assert explorer.fragment == "", "opening a page is no change"


@browser_only
def test_the_table_is_number_formats_in_every_state(explorer: Explorer) -> None:
    """Codes, values and errors of all formats, under each rounding and overflow."""
    numbers = [
        0.3,
        -1 / 3,
        257.0,
        464.0,
        464.5,
        65520.0,
        1e-8,
        -0.0,
        0.0,
        1e39,
        INF,
        NAN,
    ]
    states = itertools.cycle(itertools.product(ROUNDINGS, ("saturate", "ieee")))
    for x, (rounding, overflow) in zip(numbers * 4, states, strict=False):
        state = f"#x={x}&format=bfloat16&rounding={rounding}&overflow={overflow}"
        explorer.go(state)
        found = explorer.table

        assert list(found) == sorted(FORMATS, key=lambda name: -FORMATS[name].bits)
        for name, (*fields, value, what, error, relative) in found.items():
            fmt = FORMATS[name]
            if math.isnan(x) and fmt.nan_encoding is None:
                assert [*fields, value, error] == ["", "", "", DASH, DASH]
                assert what == "has no NaN"
                continue
            mode = overflow if fmt.nan_encoding else "saturate"
            code = encode(x, fmt, rounding, mode)
            wanted = decode(code, fmt).item()
            bits = f"{code.item() % 2**fmt.bits:0{fmt.bits}b}"
            assert "".join(fields) == bits, (state, name)
            assert len(fields[1]) == fmt.exponent_bits
            assert len(fields[2]) == fmt.mantissa_bits
            assert pattern(float(value)) == pattern(wanted), (state, name)
            off = wanted - x
            if math.isfinite(off):
                assert error == written(off)
            else:
                assert error == DASH
            if math.isfinite(off) and x:
                assert number(relative) == pytest.approx(off / x, rel=0.006)
            else:
                assert relative == DASH


@browser_only
def test_every_bit_of_every_format_can_be_flipped(explorer: Explorer) -> None:
    """A flip changes that bit and no other, and the value is that of the code."""
    for name, fmt in FORMATS.items():
        explorer.go(f"#x=0.3&format={name}")
        before = explorer.bits
        assert len(before) == fmt.bits
        buttons = explorer.page.locator(".hb-explorer__cells button")
        for place in range(0, fmt.bits, 5 if fmt.bits > 16 else 1):
            buttons.nth(place).dispatch_event("click")
            flipped = "10"[int(before[place])]
            after = before[:place] + flipped + before[place + 1 :]

            assert explorer.bits == after
            code = int(after, 2)
            code -= 2**64 if fmt.bits == 64 and code >= 2**63 else 0
            wanted = decode(torch.tensor(code), fmt).item()
            assert explorer.value == "nan" or float(explorer.value) == wanted
            assert math.isnan(wanted) == (explorer.value == "nan")
            before = after


@browser_only
def test_a_nan_keeps_its_code(explorer: Explorer) -> None:
    """Flipping through NaN reaches its every code; another format takes the number."""
    explorer.go("#x=0x7c01&format=float16")
    explorer.page.get_by_role("button", name="bit 3, mantissa, 0").click()

    assert explorer.bits == "0111110000001001"
    assert explorer.input.input_value() == "0x7c09"
    assert "0x7c09" in explorer.fact("code")
    explorer.page.get_by_label("Format", exact=True).select_option("bfloat16")
    assert explorer.input.input_value() == "nan"
    assert explorer.bits == "0111111111000000"


@browser_only
def test_the_keyboard_does_it_all(explorer: Explorer) -> None:
    """Bits are one stop: arrows, Home and End move, Space flips, focus stays."""
    page = explorer.page
    explorer.input.focus()
    explorer.input.fill("1")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.get_by_label("Format", exact=True).input_value() == "float8_e5m2"
    page.get_by_role("link", name="0x7e").focus()
    page.keyboard.press("Tab")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.getAttribute('aria-label')"))

    assert focused() == "bit 7, sign, 0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused() == "bit 5, exponent, 1"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert focused() == "bit 0, mantissa, 0"
    page.keyboard.press("Space")
    assert focused() == "bit 0, mantissa, 1"
    assert explorer.value == "1.25"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert focused() == "bit 7, sign, 1"
    assert explorer.value == "-1.25"
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert focused() == "bit 7, sign, 1", "the stop is where the reader left"
    page.get_by_label("toward zero").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_label("up, to +Inf").is_checked()


@browser_only
def test_steps_go_through_all_neighbors(explorer: Explorer) -> None:
    """Buttons and arrow keys go where `neighbours` leads, and stop at the ends."""
    first, last = explorer.page.locator(".hb-explorer__step").all()
    for name, fmt in FORMATS.items():
        x = finfo(fmt).max
        ieee = "&overflow=ieee" if fmt.nan_encoding else ""
        explorer.go(f"#x={x!r}&format={name}{ieee}")
        for button, key, index in ((last, "ArrowUp", 1), (first, "ArrowDown", 0)):
            for presses in range(4):
                wanted = neighbours(x, fmt)[index].item()
                none = math.isnan(wanted)
                assert button.get_attribute("aria-disabled") == str(none).lower()
                if presses % 2:
                    explorer.input.press(key)
                else:
                    button.dispatch_event("click")  # one that is off as well
                x = x if none else wanted
                assert float(explorer.input.input_value()) == x, name
                assert float(explorer.value) == x, name


@browser_only
def test_the_address_holds_the_state(explorer: Explorer) -> None:
    """What is typed and chosen is in the address, and the address opens it again."""
    page = explorer.page
    explorer.input.fill("1/3 + 2^-9")
    page.get_by_label("Format", exact=True).select_option("bfloat16")
    page.get_by_label("down, to").check()
    page.get_by_label("ieee").check()
    state = explorer.fragment
    before = explorer.table

    assert state.startswith("#x=1/3%20%2B%202%5E-9&format=bfloat16&rounding=down")
    assert state.endswith("&overflow=ieee")
    explorer.open(state)
    assert explorer.table == before
    assert explorer.input.input_value() == "1/3 + 2^-9"
    assert page.get_by_label("ieee").is_checked()
    explorer.open("?" + state[1:])
    assert explorer.table == before, "a query does as well"
    explorer.go("#x=1e+3&format=float32")
    assert explorer.input.input_value() == "1e+3", "written by hand"
    assert page.get_by_label("saturate").is_checked()
    assert explorer.page.locator(".hb-explorer__problem").is_hidden()
    explorer.go("#more")
    assert explorer.input.input_value() == "1e+3", "a place on the page is no state"


@browser_only
def test_an_address_that_makes_no_sense_is_told_once(explorer: Explorer) -> None:
    """One message names every part; what can be taken is, the rest is as always."""
    problem = explorer.page.locator(".hb-explorer__problem")
    state = "#x=word&format=float9&rounding=sideways&overflow=ieee&color=red"
    for open_ in (explorer.open, explorer.go):
        open_(state)
        said = problem.inner_text()

        for part in ("“word”", "“float9”", "“sideways”", "“color”", "float8_e4m3fn"):
            assert part in said
        assert problem.count() == 1
        assert explorer.input.input_value() == "0.3"
        assert explorer.value == "0.3125"
        assert explorer.page.get_by_label("ieee").is_checked()
        explorer.go("#x=1&format=float16")
        assert problem.is_hidden()
    for hard in ("#x=%zz&format=float16", "#=", "#x=", "#format=constructor", "#x=<b>"):
        explorer.open(hard)
        assert problem.is_visible(), hard
        assert explorer.value
    explorer.open("?highlight=float&x=2")
    assert problem.is_hidden()
    assert explorer.value == "2"


@browser_only
def test_what_cannot_be_read_is_told_and_the_rest_waits(explorer: Explorer) -> None:
    """The message comes when typing rests; the page keeps the last number, dimmed."""
    page, problem = explorer.page, explorer.page.locator(".hb-explorer__problem")
    hidden = explorer.input.evaluate(
        """(input) => {
            input.value = "1e";
            input.dispatchEvent(new Event("input"));
            return document.getElementById("explorer-problem").hidden;
        }"""
    )
    assert hidden, "half a number is no mistake yet"
    problem.wait_for(timeout=3000)

    assert "“1e” is not a number. Type 0.3" in problem.inner_text()
    assert "0b" in problem.inner_text()
    assert explorer.input.get_attribute("aria-invalid") == "true"
    described = str(explorer.input.get_attribute("aria-describedby")).split()
    assert problem.get_attribute("id") in described
    assert explorer.value == "0.3125"
    assert "x=1e" not in explorer.fragment
    assert page.get_by_role("status").inner_text() == problem.inner_text()
    explorer.input.fill("1e2")
    assert problem.is_hidden()
    assert explorer.input.get_attribute("aria-invalid") is None
    assert explorer.value == "96"


@browser_only
def test_changes_are_announced_politely(explorer: Explorer) -> None:
    """A live region says what is new when the reader rests, and nothing at first."""
    status = explorer.page.get_by_role("status")
    explorer.page.wait_for_timeout(400)
    assert status.inner_text() == ""
    explorer.page.get_by_role("button", name="bit 0, mantissa, 0").click()
    said = "bit 0 is 1. 0.34375 in float8_e4m3fn: 0.34375, exact"
    explorer.page.wait_for_function(
        "said => document.querySelector('[role=status]').textContent === said", arg=said
    )
    explorer.input.fill("0.3")
    explorer.page.wait_for_function(
        """() => document.querySelector('[role=status]').textContent ===
            "0.3 in float8_e4m3fn: 0.3125, rounded, off by +4.17%" """
    )


@browser_only
def test_the_line_in_python_is_true(explorer: Explorer) -> None:
    """Run as it stands, it gives the value that is shown."""
    scope = {"round_to": round_to, "decode": decode, "torch": torch}
    states = [
        ("0.3", "float8_e4m3fn"),
        ("-0", "float16"),
        ("-inf", "float8_e5m2"),
        ("0x7f", "float8_e4m3fn"),
        ("0x8000000000000001", "float64"),
        ("1e20", "float32"),
        ("2^70", "bfloat16"),
        ("1/3", "float64"),
        ("-465", "float8_e4m3fnuz"),
        ("nan", "float8_e8m0fnu"),
        ("1000", "float4_e2m1fn"),
    ]
    for (x, name), rounding, overflow in itertools.product(
        states, ROUNDINGS[:3], ("saturate", "ieee")
    ):
        explorer.go(f"#x={x}&format={name}&rounding={rounding}&overflow={overflow}")
        line = explorer.page.locator(".hb-explorer__python code").inner_text()
        value = eval(line, dict(scope))

        assert torch.equal(
            bits_of(value), bits_of(torch.tensor(float(explorer.value), dtype=F64))
        ), line


@browser_only
def test_facts_are_those_of_python(explorer: Explorer) -> None:
    """Ulp, neighbors, limits and error in ulp, of numbers in every part of a format."""
    first, last = explorer.page.locator(".hb-explorer__step b").all()
    for name, x in (("float8_e4m3fn", 0.3), ("bfloat16", -257.0), ("float16", 1e-7)):
        explorer.go(f"#x={x!r}&format={name}")
        size, info = ulp(x, name).item(), finfo(name)

        for fact, wanted in (
            ("ulp, the step here", size),
            ("largest", info.max),
            ("smallest normal", info.smallest_normal),
            ("smallest subnormal", info.smallest_subnormal),
        ):
            decimal, _, power = explorer.fact(fact).partition(" = ")
            assert float(decimal) == wanted
            assert not power or read_power(power) == Fraction(wanted)
        off = abs(round_to(x, name).item() - x) / size
        assert float(explorer.fact("error in ulp")) == pytest.approx(off, rel=0.006)
        beside = [float(first.inner_text()), float(last.inner_text())]
        assert beside == [value.item() for value in neighbours(x, name)]


@browser_only
def test_choices_show_what_each_would_give(explorer: Explorer) -> None:
    """Beside each rounding and each overflow stands its result for this number."""
    results = explorer.page.locator(".hb-explorer__choices label b")
    for x in (0.3, 500.0, -464.5, 0.001):
        explorer.go(f"#x={x!r}&format=float8_e4m3fn")
        wanted = [round_to(x, "float8_e4m3fn", r).item() for r in ROUNDINGS]
        wanted += [
            round_to(x, "float8_e4m3fn", overflow=o).item()
            for o in ("saturate", "ieee")
        ]

        found = [float(text) for text in results.all_inner_texts()]
        assert [*map(pattern, found)] == [*map(pattern, wanted)]


@browser_only
def test_the_shaded_stretch_is_what_becomes_the_same(explorer: Explorer) -> None:
    """Inside its ends numbers round to the value of x, outside they do not."""
    for name, rounding in itertools.product(
        ("float8_e4m3fn", "float8_e8m0fnu", "float16"), ROUNDINGS
    ):
        for x in (0.3, 1.0, 1.0625, 400.0):
            explorer.go(f"#x={x!r}&format={name}&rounding={rounding}")
            left, width, at = explorer.page.evaluate(
                """() => {
                    const region = document.querySelector(".hb-explorer__region").style;
                    const mark = document.querySelector(".hb-explorer__x").style;
                    return [parseFloat(region.left), parseFloat(region.width),
                            parseFloat(mark.getPropertyValue("--hb-at"))];
                }"""
            )
            below, above = (v.item() for v in neighbours(x, name))
            ends = [left, left + width]
            # The stretch is drawn with a fifth more on either side.
            scale = (above - below) * 1.4 / 100
            start = below - 0.2 * (above - below)
            assert start + at * scale == pytest.approx(x, rel=1e-3)
            value = round_to(x, name, rounding).item()
            inside = [ends[0] + width * part for part in (0.01, 0.5, 0.99)]
            outside = [end for end in (ends[0] - 1, ends[1] + 1) if 0 < end < 100]
            for places, same in ((inside, True), (outside, False)):
                for place in places:
                    there = round_to(start + place * scale, name, rounding).item()
                    assert (there == value) == same, (name, rounding, x, place)


@browser_only
def test_examples_lead_to_what_they_say(explorer: Explorer) -> None:
    """Each is a link to a state, and what it promises is what is shown."""
    links = explorer.page.locator(".hb-explorer__examples a")
    shown = {}
    for link in links.all():
        link.click()
        name = explorer.page.get_by_label("Format", exact=True).input_value()
        badge = explorer.page.locator(".hb-explorer__badge").inner_text()
        shown[link.inner_text()] = (name, explorer.value, badge)

    assert shown["257 a tie"] == ("bfloat16", "256", "rounded")
    assert shown["1e-8 underflows"] == ("float16", "0", "underflows")
    assert shown["500 saturates"] == ("float8_e4m3fn", "448", "saturates")
    assert shown["-0 loses its sign"] == ("float8_e4m3fnuz", "0", f"has no {MINUS}0")
    assert shown["0x7e one of three NaNs"] == ("float8_e5m2", "nan", "NaN")
    assert len(shown) == links.count() == 8


@browser_only
@CLIPBOARD
def test_the_link_can_be_copied(explorer: Explorer) -> None:
    """The button copies an address that opens the same state, and says so."""
    explorer.input.fill("2^-9")
    explorer.page.get_by_role("button", name="Copy a link").click()
    explorer.page.get_by_role("button", name="Copied.").wait_for()
    address = explorer.page.evaluate("navigator.clipboard.readText()")

    assert address == f"{explorer.home}#x=2%5E-9&format=float8_e4m3fn"


@browser_only
@CLIPBOARD
def test_an_address_on_its_way_is_not_written_over(explorer: Explorer) -> None:
    """Saved between a new address and its event, the old state would undo it."""
    explorer.page.evaluate(
        """() => {
            location.hash = "#x=7&format=bfloat16";
            document.querySelector(".hb-explorer__share").click();
        }"""
    )
    explorer.page.get_by_role("button", name="Copied.").wait_for()

    assert explorer.input.input_value() == "7"
    assert explorer.fragment == "#x=7&format=bfloat16"


STATES = [
    "",
    "#x=pi&format=float64",
    "#x=nan&format=float4_e2m1fn",
    "#x=-1e39&format=float8_e8m0fnu&overflow=ieee",
    "#x=word&format=float9",
    "#x=-0.001&format=float16",
]


@browser_only
@SCREENS
def test_every_state_is_accessible(explorer: Explorer) -> None:
    """axe-core finds nothing, in states with long codes, no code, and a mistake."""
    assert explorer.violations(STATES) == []


@browser_only
@PHONES
def test_no_state_is_wider_than_a_phone(explorer: Explorer) -> None:
    """Every format and the longest numbers fit, and every control can be hit."""
    hit = ":is(button, a, select, input[type=text], .hb-explorer__choices label)"
    for name in FORMATS:
        for x in ("-1.7976931348623157e308", "2.2250738585072014e-308"):
            explorer.go(f"#x={x}&format={name}&rounding=toward_zero")

            found = explorer.misfits(f"{hit}:not(th *)", ":not(thead, thead *)")
            assert found == [], (name, x)


@browser_only
@pytest.mark.parametrize(
    "context", [{"viewport": DESK, "java_script_enabled": False}], indirect=True
)
def test_without_javascript_there_is_the_table(
    context: BrowserContext, site: Path
) -> None:
    """The table stands there, a sentence says why it is all, and no control is dead."""
    page = context.new_page()
    page.goto(f"{site.as_uri()}/index.html")

    assert page.locator(".hb-explorer__hint").is_visible()
    assert page.locator(".hb-explorer tbody tr").count() == len(FORMATS)
    assert page.locator(".hb-explorer :is(button, input, select)").count() == 0


@browser_only
def test_nothing_moves_for_those_who_ask_for_it(explorer: Explorer) -> None:
    """With reduced motion there is no transition left in the explorer."""
    explorer.page.emulate_media(reduced_motion="reduce")
    moving = explorer.page.evaluate(
        """() => [...document.querySelectorAll(".hb-explorer, .hb-explorer *")].filter(
            (e) => !/^(0s(, )?)+$/.test(getComputedStyle(e).transitionDuration)
                || getComputedStyle(e).animationName !== "none").length"""
    )

    assert moving == 0
