"""Laws of the precision chooser: it shows what Python answers, to every question.

The script's look-up is compared in Chromium with `recommend_precision`, on an empty
page; what a reader does is tried on a page built from the directive of
``source/guide/choose_a_precision.md``, which is opened from the disk.
"""

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from choose import answers
from playwright.sync_api import Browser, BrowserContext, Page

from snippets.choose_a_precision import (
    FRAMEWORKS,
    HARDWARE,
    TASKS,
    NoRecommendation,
    Note,
    recommend_precision,
    written,
)
from tests.widget import CLIPBOARD, PHONES, SCREENS, Widget, build, directive, load

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "_static/choose.js"
QUESTIONS = list(product(HARDWARE, FRAMEWORKS, TASKS))
# Ties of a decimal, a byte more and less than a device, and usual ones.
SIZES = [1, 1e3, 167772160, 2.7e9, 80e9 / 18, 4444444445, 7e9, 405e9, 1e15]

browser_only = pytest.mark.browser


def asked(
    hardware: str, framework: str, task: str, parameters: float
) -> dict[str, object]:
    """Return what the script is to answer, from Python."""

    def note(one: Note) -> list[str]:
        return [one.text, one.page]

    try:
        answer = recommend_precision(hardware, framework, parameters, task)
    except NoRecommendation as refusal:
        near = refusal.nearest
        nearest = [near.hardware, near.framework, task, parameters]
        names = ("hardware", "framework", "task", "parameters")
        return {
            "why": note(refusal.why),
            "nearest": dict(zip(names, nearest, strict=True)),
        }
    memory = list(answer.memory.values())
    return {
        "name": answer.name,
        "setting": answer.setting,
        "why": note(answer.why),
        "memory": memory,
        "total": sum(memory),
        "warnings": [note(one) for one in answer.warnings],
        "alternatives": [
            {
                "name": other.name,
                "setting": other.setting,
                "why": note(other.why),
                "total": sum(int(parameters * b) for b in other.bytes_per_parameter),
            }
            for other in answer.alternatives
        ],
    }


# --------------------------------------------------------- the directive, no browser

DIRECTIVE = directive("guide/choose_a_precision", "precision-chooser")


def built_with(
    folder: Path, text: str, *, theme: bool = True, stubs: bool = True
) -> tuple[Path, str]:
    """Build a site of this page, and stubs of those that notes name."""
    data = answers()
    named = {page for _, page in (*data["notes"], data["shard"])} if stubs else set()
    pages = {page: f"# About {page.rpartition('/')[2]}\n" for page in named}
    pages |= {"index": "# Home\n", "guide/choose": text}
    return build(folder, pages, "choose", theme=theme)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a built site with the chooser of the guide."""
    text = f"# Choose\n\n## Answer\n\n{DIRECTIVE}\n\n## More\n\nText.\n"
    built, warnings = built_with(tmp_path_factory.mktemp("choose"), text)

    assert not warnings
    return built


def embedded(site: Path) -> dict[str, Any]:
    """Return the data of the page."""
    text = (site / "guide/choose.html").read_text("utf-8")
    script = BeautifulSoup(text, "html.parser").select_one("div.hb-choose script")
    assert script
    found: dict[str, Any] = json.loads(script.string or "")
    return found


def test_the_page_has_every_answer_and_links_what_explains_it(site: Path) -> None:
    """The data is `answers()` whole; each link leads to a page of the site."""
    data = embedded(site)
    wanted = json.loads(json.dumps(answers()))

    assert {key: data[key] for key in wanted} == wanted
    assert len(data["table"]) == len(QUESTIONS)
    assert set(data["pages"]) == {p for _, p in (*data["notes"], data["shard"])}
    for page, (uri, title) in data["pages"].items():
        assert (site / "guide" / uri).resolve() == (site / f"{page}.html").resolve()
        assert title == f"About {page.rpartition('/')[2]}"
    assert len(json.dumps(data)) < 100_000


def test_the_script_knows_no_rule() -> None:
    """Names of devices, frameworks and precisions stand in the data alone."""
    text = SCRIPT.read_text("utf-8")
    for word in {*HARDWARE, *FRAMEWORKS, *TASKS} - {"cpu"}:
        assert f'"{word}"' not in text
    assert not re.search(r"bf16|fp16|float|https?://", text)


def test_without_a_script_a_sentence_says_where_the_answers_are(site: Path) -> None:
    """There is no dead control."""
    text = (site / "guide/choose.html").read_text("utf-8")
    soup = BeautifulSoup(text, "html.parser").select_one("div.hb-choose")
    assert soup

    assert "switch JavaScript on" in soup.get_text()
    assert not soup.select("select, input, button")


def test_script_and_style_load_with_the_chooser_only(site: Path) -> None:
    """Pages without one do not pay for it, and it waits for the page."""
    text = (site / "guide/choose.html").read_text("utf-8")

    assert re.search(r'<script defer="defer" src="../_static/choose\.js', text)
    assert "_static/choose.css" in text
    assert "_static/choose." not in (site / "index.html").read_text("utf-8")


def test_what_makes_no_sense_is_a_located_error(tmp_path: Path) -> None:
    """A word that the rules do not know, no number, a refused combination."""
    senseless = [
        ("h200x lightning 7e9 pretrain", "hardware must be one of .*'h200x'"),
        ("h100 lightning many pretrain", "could not convert string to float"),
        ("h100 lightning nan pretrain", "from 1 to 1e15, got nan"),
        ("a100 transformer-engine 7e9 pretrain", "runs on NVIDIA's GPUs with FP8"),
        ("h100 lightning 7e9", "4 argument"),
    ]
    text = "".join(f"\n```{{precision-chooser}} {case}\n```\n" for case, _ in senseless)
    _, warnings = built_with(tmp_path, f"# T\n{text}", theme=False)

    for _, complaint in senseless:
        assert re.search(rf"choose\.md:\d+: ERROR: (?s:.*?){complaint}", warnings)
    assert warnings.count("ERROR") == len(senseless)


def test_a_page_that_there_is_not_is_a_warning(tmp_path: Path) -> None:
    """A rule cannot name a page that was moved."""
    _, warnings = built_with(
        tmp_path, f"# T\n\n{DIRECTIVE}\n", theme=False, stubs=False
    )

    assert "the rules name a page that there is not: guide/fp8" in warnings


# --------------------------------------------------------- the answers


@pytest.fixture(scope="module")
def blank(browser: Browser) -> Iterator[Page]:
    """Load the script into an empty page.

    Yields:
        The page.
    """
    page = load(browser, "choose")
    page.evaluate("data => { globalThis.data = data; }", answers())
    yield page
    page.close()


@browser_only
@pytest.mark.parametrize("parameters", SIZES)
def test_every_answer_is_pythons(blank: Page, parameters: float) -> None:
    """All devices, frameworks and tasks: names, notes and bytes, to the last byte."""
    found = blank.evaluate(
        """([questions, parameters]) => questions.map(([hardware, framework, task]) =>
            halfTheBitsChooser.answer(
                data, { hardware, framework, task, parameters }))""",
        [QUESTIONS, parameters],
    )

    for question, answer in zip(QUESTIONS, found, strict=True):
        assert answer == asked(*question, parameters), question


@browser_only
def test_bytes_are_written_as_in_python(blank: Page) -> None:
    """Each unit, both sides of it, and ties of the decimal."""
    numbers = [0, 1, 7, 1023, 1024, 1280, 2**20 - 1, 2**20, 2**30, 2**60]
    numbers += [n * 2**26 for n in range(1, 200)] + [7**k for k in range(18)]

    found = blank.evaluate("n => n.map(halfTheBitsChooser.written)", numbers)

    assert found == [written(n) for n in numbers]


@browser_only
def test_numbers_of_parameters_are_read_as_people_write_them(blank: Page) -> None:
    """Python's literals, and K, M, B and T; rounded once; what is no number is null."""
    cases: dict[str, float | None] = {
        "7e9": 7e9,
        "7E+9": 7e9,
        "7B": 7e9,
        " 125 m ": 125e6,
        "2.7b": 2.7e9,
        "1.1T": 1.1e12,
        "0.5k": 500,
        ".5K": 500,
        "1": 1,
        "1e15": 1e15,
        "7,000,000,000": 7e9,
        "7_000_000": 7e6,
        "12345.": 12345,
    }
    cases |= dict.fromkeys([
        "",
        "0",
        "-7e9",
        "0.5",
        "1e16",
        "1e999",
        "nan",
        "inf",
        "7x",
        "7,5",
        "e9",
        "7e",
    ])
    found = blank.evaluate(
        "texts => texts.map(halfTheBitsChooser.readParameters)", list(cases)
    )

    assert dict(zip(cases, found, strict=True)) == cases


# --------------------------------------------------------- the page


class Chooser(Widget):
    """The page with the chooser."""

    name = "choose"


@pytest.fixture
def chooser(context: BrowserContext, site: Path) -> Iterator[Chooser]:
    """Open the page.

    Yields:
        The page with the chooser, which must not have asked any server for anything.
    """
    chooser = Chooser(context.new_page(), site / "guide/choose.html")
    yield chooser
    assert chooser.wrong == []


@browser_only
def test_it_opens_with_the_usual_and_shows_all_of_the_answer(chooser: Chooser) -> None:
    """Setting, reason, bytes, warnings and alternatives of the directive's words."""
    answer = recommend_precision("h100", "lightning", 7e9, "pretrain")

    assert chooser.text("setting") == answer.setting
    assert answer.why.text[1:] in chooser.text("why")
    assert chooser.text("total") == written(sum(answer.memory.values()))
    shown = chooser.text("memory").replace("\n", " ")
    for kind, size in answer.memory.items():
        assert (f"{kind} {written(size)}" in shown) == (size > 0)
    for part, notes in (
        ("warnings", answer.warnings),
        ("others", [other.why for other in answer.alternatives]),
    ):
        items = chooser.page.locator(f".hb-choose__{part} li")
        assert items.count() == len(notes)
        for item, note in zip(items.all(), notes, strict=True):
            assert f"{note.text[0].upper()}{note.text[1:]}." in item.inner_text()
            link = item.locator("a")
            assert str(link.get_attribute("href")).endswith(
                f"{note.page.rpartition('/')[2]}.html"
            )
            assert link.inner_text() == f"About {note.page.rpartition('/')[2]}"
    assert chooser.fragment == "", "opening a page is no change"


@browser_only
def test_every_question_is_shown_as_it_is_answered(chooser: Chooser) -> None:
    """Each device, framework and task through the page: the setting, or why not."""
    found = chooser.page.evaluate(
        """([questions]) => questions.map((words) => {
            ["hardware", "framework", "task"].forEach((key, i) => {
                const select = document.getElementById(`choose-${key}`);
                select.value = words[i];
                select.dispatchEvent(new Event("change"));
            });
            const text = (part) => document.querySelector(`.hb-choose__${part}`)
                ?.textContent ?? null;
            return [text("setting"), text("no"), text("total"), text("near"),
                    document.querySelectorAll(".hb-choose__others li").length,
                    text("python")];
        })""",
        [QUESTIONS],
    )
    scope = {"recommend_precision": recommend_precision}
    for question, shown in zip(QUESTIONS, found, strict=True):
        setting, no, total, near, others, python = shown
        line = python.removeprefix("In Python ")
        try:
            answer = eval(line, dict(scope))
        except NoRecommendation as refusal:
            answer, nearest = None, refusal.nearest
        if answer is None:
            assert (setting, no) == (None, "No recommendation")
            assert nearest.setting in near
            assert nearest.framework in near
            continue
        assert (answer.hardware, answer.framework, answer.task) == question
        assert (setting, no) == (answer.setting, None)
        assert total == written(sum(answer.memory.values()))
        assert others == len(answer.alternatives)


@browser_only
def test_the_address_holds_the_state(chooser: Chooser) -> None:
    """What is chosen is in the address, and the address opens it again."""
    page = chooser.page
    page.get_by_label("Device").select_option("t4")
    page.get_by_label("Framework").select_option("torch")
    page.get_by_label("Task").select_option("speech")
    page.get_by_label("Parameters").fill("125 M")
    state = chooser.fragment

    assert state == "#hardware=t4&framework=torch&task=speech&parameters=125%20M"
    said = chooser.text("out")
    chooser.open(state)
    assert chooser.text("out") == said
    assert page.get_by_label("Parameters").input_value() == "125 M"
    chooser.go("#parameters=1e+3")
    assert page.get_by_label("Parameters").input_value() == "1e+3"
    assert page.get_by_label("Device").input_value() == "h100", "the usual"
    chooser.go("#more")
    assert page.get_by_label("Parameters").input_value() == "1e+3", "a place, no state"


@browser_only
def test_an_address_that_makes_no_sense_is_told_once(chooser: Chooser) -> None:
    """One message names every part; what can be taken is, the rest is as always."""
    problem = chooser.page.locator(".hb-choose__problem")
    state = "#hardware=abacus&framework=torch&task=<b>&parameters=many&color=red"
    for open_ in (chooser.open, chooser.go):
        open_(state)
        said = problem.inner_text()
        for part in ("“abacus”", "“<b>”", "“many”", "“color”", "rtx-4090"):
            assert part in said
        assert problem.count() == 1
        assert chooser.page.get_by_role("status").inner_text() == said
        assert chooser.page.get_by_label("Framework").input_value() == "torch"
        assert chooser.page.get_by_label("Device").input_value() == "h100"
        assert chooser.text("setting") == "torch.autocast(device, torch.bfloat16)"
        chooser.go("#hardware=t4")
        assert problem.is_hidden()
    for hard in ("#=", "#hardware=", "#task=constructor", "#parameters=%zz", "#x=1"):
        chooser.open(hard)
        assert problem.is_visible(), hard
        assert chooser.text("setting")


@browser_only
def test_half_a_number_is_no_mistake_until_typing_rests(chooser: Chooser) -> None:
    """Then it is told, the answer before it stays, dimmed, and the address too."""
    field, problem = (
        chooser.page.get_by_label("Parameters"),
        chooser.page.locator(".hb-choose__problem"),
    )
    before = chooser.text("out")
    field.fill("7e")
    problem.wait_for(timeout=3000)

    assert "“7e” is no number of parameters from 1 to 1e15" in problem.inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    assert problem.get_attribute("id") == field.get_attribute("aria-describedby")
    assert chooser.text("out") == before
    assert chooser.fragment == ""
    field.fill("7e8")
    assert problem.is_hidden()
    assert field.get_attribute("aria-invalid") is None
    assert chooser.text("total") == written(126 * 10**8)


@browser_only
def test_a_refusal_leads_to_what_is_nearest(chooser: Chooser) -> None:
    """Its link opens that answer, for the same task and size."""
    chooser.go("#hardware=a100&framework=transformer-engine&parameters=1.5B")
    assert "Transformer-engine runs on NVIDIA's GPUs with FP8" in chooser.text("why")
    chooser.page.locator(".hb-choose__near a").click()

    assert chooser.text("setting") == "torch.autocast(device, torch.bfloat16)"
    assert chooser.page.get_by_label("Device").input_value() == "a100"
    assert chooser.page.get_by_label("Parameters").input_value() == "1.5B"


@browser_only
def test_changes_are_announced_politely_and_by_keyboard(chooser: Chooser) -> None:
    """A live region says what is new when the reader rests, and nothing at first."""
    page = chooser.page
    page.wait_for_timeout(400)
    assert page.get_by_role("status").inner_text() == ""
    page.get_by_label("Device").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose-framework"
    answer = recommend_precision("cpu", "lightning", 7e9, "pretrain")
    said = f"Set {answer.setting}. It holds {written(112 * 10**9)}, with "
    page.wait_for_function(
        "said => document.querySelector('[role=status]').textContent.startsWith(said)",
        arg=said,
    )


@browser_only
@CLIPBOARD
def test_the_link_can_be_copied(chooser: Chooser) -> None:
    """The button copies an address that opens the same state, and says so."""
    chooser.page.get_by_label("Task").select_option("rl")
    chooser.page.get_by_role("button", name="Copy a link").click()
    chooser.page.get_by_role("button", name="Copied.").wait_for()
    address = chooser.page.evaluate("navigator.clipboard.readText()")

    state = "#hardware=h100&framework=lightning&task=rl&parameters=7e9"
    assert address == chooser.home + state


STATES = [
    "",
    "#hardware=b200&framework=megatron&parameters=405e9",
    "#hardware=b200&framework=transformer-engine&task=inference",
    "#hardware=a100&framework=transformer-engine",
    "#hardware=abacus&color=red",
    "#hardware=t4&framework=torch&task=lora",
]


@browser_only
@SCREENS
def test_every_state_is_accessible(chooser: Chooser) -> None:
    """axe-core finds nothing in answers, refusals and a mistake."""
    assert chooser.violations(STATES) == []


@browser_only
@PHONES
def test_no_state_is_wider_than_a_phone(chooser: Chooser) -> None:
    """The longest settings wrap, and every control can be hit."""
    for state in STATES:
        chooser.go(state) if state else None

        hit, inside = ":is(button, select, input)", ".hb-choose__panel *:not(option)"
        assert chooser.misfits(hit, inside) == [], state


@browser_only
def test_a_query_opens_a_state_and_other_words_of_it_are_not_ours(
    chooser: Chooser,
) -> None:
    """A link may carry a query, as search engines and themes add to addresses."""
    chooser.open("?highlight=bf16&hardware=t4&framework=torch")

    assert chooser.page.get_by_label("Device").input_value() == "t4"
    assert chooser.page.locator(".hb-choose__problem").is_hidden()
