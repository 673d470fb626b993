"""Tests of _ext/verified/outputs.py: what counts as the same output or exception."""

import doctest
import itertools
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from verified.outputs import NUMBER, Checker, expected_exception, raised, vague

CHECKER = Checker()


def same(want: str, got: str, flags: int = NUMBER) -> bool:
    """Compare as a page does, which ends each output with a newline."""
    return CHECKER.check_output(f"{want}\n", f"{got}\n", flags)


def test_a_number_agrees_with_all_its_roundings() -> None:
    """Each of 4,000 values equals what Python prints of it, to 0 to 6 digits."""
    for step, digits in itertools.product(range(-2000, 2000), range(7)):
        value = step * 0.00137
        for shown in (f"{value:.{digits}e}", f"{value:#.{digits}f}"):
            if "." in shown or "e" in shown:
                assert same(shown, repr(value)), (shown, value)


@pytest.mark.parametrize("digits", range(1, 6))
def test_one_unit_off_in_the_last_digit_is_another_number(digits: int) -> None:
    """With the value in the middle of its digits, both neighbors differ."""
    unit = Decimal(1).scaleb(-digits)
    value = Decimal("3.14159265358979")
    shown = value.quantize(unit, ROUND_HALF_EVEN)

    assert same(str(shown), str(value))
    assert not same(str(shown + unit), str(value))
    assert not same(str(shown - unit), str(value))


@pytest.mark.parametrize(
    ("want", "got", "agree"),
    [
        # Half a unit agrees with both neighbors: libraries round either way.
        ("0.12", "0.125", True),
        ("0.13", "0.125", True),
        ("0.12", "0.1250001", False),
        ("0.11", "0.125", False),
        # What is shown after the point counts, not what is before it.
        ("12345.7", "12345.678", True),
        ("12345.7", "12345.6", False),
        ("1.", "1.4", True),
        ("1.", "1.6", False),
        (".5", "0.4999", True),
        # Exponents, on either side.
        ("1.2e-05", "1.2345e-05", True),
        ("1.3e-05", "1.2345e-05", False),
        ("1.2e-05", "0.000012345", True),
        ("1e5", "100000.0", True),
        ("1e5", "149999.0", True),
        ("1e5", "150001.0", False),
        ("1.0E+2", "100.4", True),
        # Signs.
        ("-0.33", "-0.3333", True),
        ("-0.33", "0.3333", False),
        ("+0.33", "+0.3333", True),
        ("0.00", "-1e-9", True),
        # Integers are exact, and are not floats.
        ("3", "3", True),
        ("3", "4", False),
        ("3", "3.0", False),
        ("3.0", "3", False),
        ("10 of 0.5", "11 of 0.5", False),
        ("10 of 0.5", "10 of 0.5001", True),
        # What is no number is text.
        ("nan", "nan", True),
        ("nan", "0.5", False),
        ("0.5", "nan", False),
        ("inf", "inf", True),
        ("-inf", "inf", False),
        ("0.5", "inf", False),
        ("[nan, 0.5]", "[nan, 0.5001]", True),
        ("torch 2.13.0", "torch 2.13.1", False),
        ("0x1.8p3", "0x1.9p3", False),
        ("v1.5", "v1.4", False),
        # Inside of lists and words.
        ("[0.1, 0.2]", "[0.1000001, 0.1999999]", True),
        ("[0.1, 0.2]", "[0.2, 0.1]", False),
        ("tensor([0.1000, 0.2000])", "tensor([0.10001, 0.2000])", True),
        ("{'a': 0.5, 'b': 2}", "{'a': 0.5, 'b': 3}", False),
        ("loss=0.5;", "loss=0.51;", True),
        ("loss=0.5;", "less=0.51;", False),
        # One number more or less is a difference, even if the rest agrees.
        ("[0.1, 0.2]", "[0.1, 0.2, 0.3]", False),
        ("[0.1, 0.2, 0.3]", "[0.1, 0.2]", False),
        ("0.5", "", False),
        ("", "0.5", False),
    ],
)
def test_digits_shown(want: str, got: str, *, agree: bool) -> None:
    """A float agrees when it rounds to the digits that the page shows."""
    assert same(want, got) is agree


def test_without_the_flag_every_digit_counts() -> None:
    """NUMBER is asked for, or off."""
    assert not same("0.33", "0.3333", 0)
    assert not same("0.33", "0.3333", doctest.ELLIPSIS)


@pytest.mark.parametrize(
    ("want", "got", "agree"),
    [
        ("a ... 0.33", "a b c 0.3333", True),
        ("a ... 0.33", "a b c 0.3433", False),
        ("0.1 ... 0.3", "0.1001 words 0.3001", True),
        # With unlike counts no float has a partner, so all must agree as text.
        ("0.1 ... 0.3", "0.1001 0.2 0.3001", False),
        ("0.1 ... 0.3", "0.1 0.2 0.3", True),
    ],
)
def test_an_ellipsis_stands_between_numbers(
    want: str, got: str, *, agree: bool
) -> None:
    """NUMBER and ELLIPSIS work together, and fail closed where they cannot."""
    assert same(want, got, NUMBER | doctest.ELLIPSIS) is agree


def test_a_difference_shows_what_was_printed() -> None:
    """The report has both texts as they are."""
    example = doctest.Example("", "0.33 and more\n")
    report = CHECKER.output_difference(example, "0.5\n", NUMBER)

    assert "0.33 and more" in report
    assert "0.5" in report


@pytest.mark.parametrize(
    "message",
    [
        *("ValueError: ...", "ValueError:...", "ValueError...", "..."),
        *("KeyError: '...'", "... : a message", "ValueError: ..., ...", "V...r: no"),
    ],
)
def test_a_message_that_matches_anything_is_vague(message: str) -> None:
    """An ellipsis must leave something to compare."""
    assert vague(message)


@pytest.mark.parametrize(
    "message",
    [
        *("ValueError", "ValueError: x", "KeyError: 'weight'", "StopIteration"),
        *("ValueError: expected 3 values, got ...", "OSError: [Errno 2] ... file"),
    ],
)
def test_a_message_in_part_is_not_vague(message: str) -> None:
    """A true message may leave out what differs from machine to machine."""
    assert not vague(message)


def test_an_announced_exception_is_its_last_lines() -> None:
    """The stack is whatever is indented; a message may have several lines."""
    stack = "Traceback (most recent call last):\n    ...\n"
    assert expected_exception(f"{stack}ValueError: one\ntwo\n") == (
        "ValueError: one\ntwo\n"
    )
    assert expected_exception("ValueError: one\n") is None
    assert expected_exception("printed\n" + stack + "ValueError: one\n") is None
    assert expected_exception(None) is None


def test_an_exception_reads_as_the_interpreter_prints_it() -> None:
    """With its message, its notes, and for a SyntaxError without the source line."""
    error = ValueError("one\ntwo")
    error.add_note("a note")
    assert raised(error) == "ValueError: one\ntwo\na note\n"
    assert raised(KeyError("weight")) == "KeyError: 'weight'\n"
    assert raised(StopIteration()) == "StopIteration\n"

    with pytest.raises(SyntaxError) as caught:
        compile("1 2", "page", "exec")
    assert raised(caught.value).startswith("SyntaxError: invalid syntax")
