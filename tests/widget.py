"""An interactive part of a page, as tests of its script and of its page meet it."""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[1]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
# In each of these every state of a widget is checked.
SCREENS = pytest.mark.parametrize(
    "context",
    [
        {"viewport": DESK, "color_scheme": "light"},
        {"viewport": DESK, "color_scheme": "dark"},
        {"viewport": PHONE, "color_scheme": "dark"},
    ],
    indirect=True,
    ids=["light", "dark", "phone"],
)
PHONES = pytest.mark.parametrize(
    "context",
    [{"viewport": {"width": w, "height": 740}, "is_mobile": True} for w in (320, 360)],
    indirect=True,
    ids=["320", "360"],
)
CLIPBOARD = pytest.mark.parametrize(
    "context",
    [{"viewport": DESK, "permissions": ["clipboard-read", "clipboard-write"]}],
    indirect=True,
    ids=["clipboard"],
)


def directive(page: str, name: str) -> str:
    """Return a widget's directive, as a page of the guide has it."""
    text = (ROOT / f"source/{page}.md").read_text("utf-8")
    found = re.search(rf"(?ms)^```\{{{name}\}}.*?^```", text)
    assert found, f"{page} has no {name}"
    return found[0]


def build(
    folder: Path, pages: Mapping[str, str], extension: str, *, theme: bool = True
) -> tuple[Path, str]:
    """Build a site of Markdown pages, in the guide's theme or bare.

    Returns:
        Its folder, and the warnings.
    """
    source = folder / "source"
    source.mkdir()
    (source / "_static").symlink_to(ROOT / "_static")
    look = f"""
html_theme = "sphinx_book_theme"
templates_path = [{str(ROOT / "_templates")!r}]
extensions += ["sphinx.ext.doctest", "look"]
"""
    conf = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "_ext")!r}]
extensions = ["myst_parser", {extension!r}]
html_static_path = ["_static"]
{look if theme else ""}
"""
    (source / "conf.py").write_text(conf, "utf-8")
    for name, text in pages.items():
        file = source / f"{name}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"---\norphan: true\n---\n{text}", "utf-8")
    sphinx = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "html", source, folder / "html"],
        capture_output=True,
        text=True,
        check=True,
    )
    return folder / "html", sphinx.stderr


def load(browser: Browser, name: str) -> Page:
    """Load a widget's script into an empty page."""
    page = browser.new_page()
    for file in ("widget", name):
        page.add_script_tag(path=ROOT / f"_static/{file}.js")
    return page


class Widget:
    """A page with a widget, opened from the disk; what goes wrong on it is noted."""

    name: str  # of its class and files

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.home = page, file.as_uri()
        self.wrong: list[str] = []
        page.on("request", lambda request: self._note(request.url))
        page.on("requestfailed", lambda request: self.wrong.append(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "console",
            lambda said: (
                self.wrong.append(said.text)
                if said.type in {"error", "warning"}
                else None
            ),
        )
        self.open()

    def _note(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.wrong.append(url)

    def open(self, state: str = "") -> None:
        """Load the page anew."""
        self.page.goto("about:blank")
        self.page.goto(self.home + state)

    def go(self, state: str) -> None:
        """Change the address of the page that is open."""
        self.page.evaluate(
            """state => new Promise((done) => {
                addEventListener("hashchange", () => setTimeout(done), { once: true });
                setTimeout(done, 500);  // no event: the state is that of the address
                location.hash = state;
            })""",
            state,
        )

    def text(self, part: str) -> str:
        """Return what a part says."""
        return self.page.locator(f".hb-{self.name}__{part}").inner_text()

    @property
    def fragment(self) -> str:
        """The state in the address, when it has settled."""
        self.page.wait_for_timeout(400)
        return str(self.page.evaluate("location.hash"))

    def violations(self, states: Iterable[str]) -> list[str]:
        """Run axe-core on the widget in each state; return what it finds."""
        self.page.emulate_media(reduced_motion="reduce")
        axe, found = Axe(), []
        for state in states:
            self.go(state) if state else None
            results = axe.run(
                self.page,
                context=f".hb-{self.name}",
                options={"resultTypes": ["violations"], "preload": False},
            )
            found += [
                f"{state}: {broken['id']}: {node['html'][:160]} "
                f"{node['failureSummary']}"
                for broken in results.response["violations"]
                for node in broken["nodes"][:3]
            ]
        return found

    def misfits(self, hit: str, inside: str) -> list[Any]:
        """Return what does not fit the screen, or is too small to be hit.

        Args:
            hit: Selector of what is touched.
            inside: Selector of what must lie inside of the widget.
        """
        found: list[Any] = self.page.evaluate(
            """([name, hit, inside]) => {
                const all = (selector) => [...document.querySelectorAll(
                    `.hb-${name} ${selector}`)].map((element) => ({
                        text: element.outerHTML,
                        box: element.getBoundingClientRect() }));
                const outer = document.querySelector(`.hb-${name}`)
                    .getBoundingClientRect();
                const small = all(hit).filter(({ box }) =>
                    box.width && Math.min(box.width, box.height) < 23.5);
                const cut = all(inside).filter(({ box }) => box.width > 1
                    && (box.right > outer.right + 1 || box.left < outer.left - 1));
                const page = document.documentElement.scrollWidth;
                return [...small, ...cut].map((e) => e.text)
                    .concat(page > innerWidth ? [`the page is ${page} wide`] : []);
            }""",
            [self.name, hit, inside],
        )
        return found
