"""What a reader meets: the built site in a real browser.

Needs Chromium or Chrome on the search path. Opens ``build/html``, or the folder that
``GUIDE_HTML`` names: once served on this machine, once from the disk.
"""

import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page

from tests.widget import CLIPBOARD, DESK, PHONE

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
HTML = Path(os.environ.get("GUIDE_HTML", ROOT / "build" / "html")).resolve()

# axe-core's rules that a page may break, each with its reason.
ALLOWED = {
    "region": "the theme puts the sidebar's logo and search beside the landmarks",
}


# A token of code looks as the others of its kind in blocks of its kind, so axe-core
# measures the first one on a page: files that are shown whole have thousands.
ONE_OF_A_KIND = """() => {
    const seen = new Set();
    for (const token of document.querySelectorAll("div.highlight span:not(:has(*))")) {
        const block = token.closest("div.highlight").parentElement;
        const kind = [block, token.parentElement, token].map((e) => e.className).join();
        if (seen.has(kind)) token.replaceWith(token.textContent);
        seen.add(kind);
    }
}"""


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not write a line per request."""

    def log_message(self, *args: object) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def pages() -> list[str]:
    """Return the address of every page, relative to the site's root."""
    files = [f for f in HTML.rglob("*.html") if "_static" not in f.parts]
    assert HTML / "index.html" in files, f"no site in {HTML}: run `make html` first"
    return sorted(file.relative_to(HTML).as_posix() for file in files)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Serve the site on this machine.

    Yields:
        Its address.
    """
    handler = partial(Quiet, directory=str(HTML))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """Return an empty tab."""
    return context.new_page()


@pytest.mark.parametrize("where", ["server", "disk"])
def test_no_request_leaves_the_site_and_none_fails(
    where: str, server: str, pages: list[str], page: Page
) -> None:
    """All that a page loads lies in its own folder, and no script complains."""
    home = server if where == "server" else f"{HTML.as_uri()}/"
    wrong: list[str] = []
    page.on(
        "request",
        lambda r: None if r.url.startswith((home, "data:")) else wrong.append(r.url),
    )
    page.on("requestfailed", lambda r: wrong.append(f"{r.url}: {r.failure}"))
    page.on("response", lambda r: wrong.append(r.url) if r.status >= 400 else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda m: wrong.append(m.text) if m.type in {"error", "warning"} else None,
    )
    for name in pages:
        page.goto(home + name, wait_until="networkidle")

        assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize(
    ("context", "options"),
    [
        ({"viewport": DESK, "color_scheme": "light"}, {}),
        # The theme changes colors and nothing else, the width all but colors.
        (
            {"viewport": DESK, "color_scheme": "dark"},
            {"runOnly": ["color-contrast", "link-in-text-block"]},
        ),
        ({"viewport": PHONE}, {"rules": {"color-contrast": {"enabled": False}}}),
    ],
    indirect=["context"],
    ids=["light", "dark", "phone"],
)
def test_pages_are_accessible(
    options: dict[str, Any], server: str, pages: list[str], page: Page
) -> None:
    """axe-core finds nothing beyond ALLOWED: names, order, contrast, landmarks."""
    page.emulate_media(reduced_motion="reduce")  # no color is caught half-way
    found: list[str] = []
    broken: set[str] = set()
    for name in pages:
        page.goto(server + name)
        page.evaluate(ONE_OF_A_KIND)
        results = Axe().run(page, options={"resultTypes": ["violations"], **options})
        for violation in results.response["violations"]:
            broken.add(violation["id"])
            if violation["id"] in ALLOWED:
                continue
            found += [
                f"{name}: {violation['id']}: {node['html'][:160]} "
                f"{node['failureSummary'][:300]}"
                for node in violation["nodes"][:3]
            ]

    assert not found, "\n".join(found)
    if not options:
        assert set(ALLOWED) == broken, "an exception is no longer needed: remove it"


@pytest.mark.parametrize(
    "context", [{"viewport": PHONE, "is_mobile": True}], indirect=True, ids=["phone"]
)
def test_no_page_is_wider_than_a_phone(
    server: str, pages: list[str], page: Page
) -> None:
    """Wide code, tables and formulas scroll by themselves; the page does not."""
    wide = {}
    for name in pages:
        page.goto(server + name)
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wide[name] = width

    assert not wide


@CLIPBOARD
def test_copy_button_copies_code_alone(
    server: str, pages: list[str], page: Page
) -> None:
    """A copied block is the code: no prompt, no output; outputs have no button."""
    kinds = set()
    for name in pages:
        page.goto(server + name, wait_until="networkidle")

        assert page.locator(".highlight-none button.copybtn").count() == 0
        for block in page.locator("div.highlight:has(> button.copybtn)").all()[:12]:
            shown = block.locator("pre").inner_text().rstrip("\n").split("\n")
            prompts = [
                line for line in shown if re.match(r"(>>> |\.\.\.( |$)|\$ )", line)
            ]
            button = block.locator("button.copybtn")
            button.dispatch_event("click")
            page.wait_for_function(
                "b => b.classList.contains('success')", arg=button.element_handle()
            )
            copied = page.evaluate("navigator.clipboard.readText()").split("\n")
            kinds.add(bool(prompts))
            if prompts:
                code = [re.sub(r"^(>>> |\.\.\. ?|\$ )", "", line) for line in prompts]

                assert [line for line in copied if line] == [
                    line for line in code if line
                ]
            else:
                assert copied == shown

    assert kinds == {True, False}, "both kinds of block are on the site"


def test_search_finds_a_page_from_the_disk(page: Page) -> None:
    """Searching works with no server at all."""
    page.goto(f"{HTML.as_uri()}/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("stochastic rounding")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    # Results are added one at a time, each after a timer; the summary is last.
    page.get_by_text("Search finished").wait_for()
    links = [
        str(link.get_attribute("href"))
        for link in page.locator("#search-results li > a").all()
    ]

    assert "guide/stochastic_rounding.html" in links[0], links
    assert any("guide/true_half.html" in link for link in links), links


def test_keyboard_reaches_the_text_first_and_shows_where_it_is(
    server: str, page: Page
) -> None:
    """The first stop is a visible link past the menu; every stop has a ring."""
    page.emulate_media(reduced_motion="reduce")  # the theme slides the link in
    page.goto(f"{server}start/first_run.html", wait_until="networkidle")
    page.keyboard.press("Tab")
    skip = page.locator(":focus")

    assert skip.get_attribute("href") == "#main-content"
    box = skip.bounding_box()
    assert box is not None
    assert box["y"] >= 0
    assert box["height"] > 10

    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        stop, ring = page.evaluate(
            """() => {
                const e = document.activeElement, s = getComputedStyle(e);
                return [e.outerHTML.slice(0, 200),
                        s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2];
            }"""
        )
        seen.add(stop)

        assert ring, stop
    assert len(seen) > 15, "the keyboard is caught"


@pytest.mark.parametrize(
    ("context", "theme"),
    [
        ({"viewport": DESK, "color_scheme": "dark"}, "dark"),
        ({"viewport": DESK, "color_scheme": "light"}, "light"),
    ],
    indirect=["context"],
    ids=["dark", "light"],
)
def test_colors_follow_the_system(theme: str, server: str, page: Page) -> None:
    """Without a choice by the reader, the page is as dark as their system."""
    page.goto(f"{server}index.html")

    assert page.locator("html").get_attribute("data-theme") == theme
    assert page.locator(f".logo__image.only-{theme}").is_visible()


@pytest.mark.parametrize(
    "context", [{"viewport": DESK, "java_script_enabled": False}], indirect=True
)
def test_text_and_formulas_need_no_script(server: str, page: Page) -> None:
    """With scripts off, the text stands there and formulas are drawn."""
    page.goto(f"{server}background/why_half_the_bits.html")
    formula = page.locator("div.math math").first.bounding_box()

    assert page.get_by_role("heading", level=1).is_visible()
    assert formula is not None
    assert formula["width"] > 100
    assert formula["height"] > 15
