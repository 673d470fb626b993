"""Laws of the built site that need no browser: links, hosts, weight, drawn bits.

They read ``build/html``, or the folder that ``GUIDE_HTML`` names.
"""

import gzip
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup, Tag

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[1]
HTML = Path(os.environ.get("GUIDE_HTML", ROOT / "build" / "html")).resolve()

# Pages that no other page needs to link: they are found by address or by the search.
UNLINKED = {"404.html", "search.html", "genindex.html"}

# What a reader waits for on first opening a page, compressed as servers do; the theme's
# script that draws icons a second time would be 540,000 by itself.
WEIGHT_LIMIT = 350_000
ICONS = "_static/vendor/fontawesome/webfonts/fa-solid-900.woff2"

Soups = dict[Path, BeautifulSoup]


@pytest.fixture(scope="module")
def soups() -> Soups:
    """Return every page of the built site, parsed."""
    files = [f for f in HTML.rglob("*.html") if "_static" not in f.parts]
    assert HTML / "index.html" in files, f"no site in {HTML}: run `make html` first"
    return {f: BeautifulSoup(f.read_text("utf-8"), "html.parser") for f in files}


def values(soup: BeautifulSoup, *pairs: tuple[str, str]) -> list[str]:
    """Return the given attributes of the given tags, in the order of the page."""
    found = []
    for tag in soup.find_all([name for name, _ in pairs]):
        assert isinstance(tag, Tag)
        found += [
            str(tag[a]) for name, a in pairs if tag.name == name and a in tag.attrs
        ]
    return found


def target(page: Path, link: str) -> tuple[Path, str]:
    """Return the file and the fragment that a link of a page leads to."""
    url = urlsplit(link)
    path = unquote(url.path)
    if not path:
        return page, unquote(url.fragment)
    # The 404 page is shown for any address, so its links begin at the site's root.
    file = HTML / path.lstrip("/") if path.startswith("/") else page.parent / path
    return file.resolve(), unquote(url.fragment)


def is_local(link: str) -> bool:
    """Say whether a link stays on the site."""
    url = urlsplit(link)
    return not url.netloc and url.scheme in {"", "file"}


def test_every_link_and_fragment_resolves(soups: Soups) -> None:
    """A link inside the site leads to a file that exists, and to an id on it."""
    ids = {
        page: {str(tag["id"]) for tag in soup.find_all(id=True)}
        for page, soup in soups.items()
    }
    broken = []
    for page, soup in soups.items():
        for link in values(soup, ("a", "href"), ("img", "src"), ("link", "href")):
            if not is_local(link):
                continue
            file, fragment = target(page, link)
            if file not in ids:
                if not file.is_file():
                    broken.append(f"{page.relative_to(HTML)}: {link} (no such file)")
            elif fragment and fragment not in ids[file]:
                broken.append(f"{page.relative_to(HTML)}: {link} (no such place)")

    assert not broken, "\n".join(broken)


def test_every_page_is_reached_from_the_first(soups: Soups) -> None:
    """Following links from the first page leads to every page."""
    reached: set[Path] = set()
    ahead = [HTML / "index.html"]
    while ahead:
        page = ahead.pop()
        if page in reached or page not in soups:
            continue
        reached.add(page)
        links = values(soups[page], ("a", "href"))
        ahead += [target(page, link)[0] for link in links if is_local(link)]
    missed = {str(p.relative_to(HTML)) for p in set(soups) - reached}

    assert missed <= UNLINKED


def test_nothing_is_fetched_from_another_host(soups: Soups) -> None:
    """Scripts, styles, images, fonts and frames come from the site's own folder."""
    fetched = [
        ("script", "src"),
        ("link", "href"),
        ("img", "src"),
        ("source", "src"),
        ("iframe", "src"),
    ]
    foreign = [
        f"{page.relative_to(HTML)}: {link}"
        for page, soup in soups.items()
        for link in values(soup, *fetched)
        if urlsplit(link).netloc and f'rel="canonical" href="{link}"' not in str(soup)
    ]
    for sheet in HTML.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import\s+)['\"]?(https?:)?//", sheet.read_text())
        foreign += [f"{sheet.relative_to(HTML)}: {url}" for url in urls]

    assert not foreign, "\n".join(foreign)


def test_a_page_is_light(soups: Soups) -> None:
    """A first visit to any page transfers less than WEIGHT_LIMIT bytes."""
    heavy = {}
    for page, soup in soups.items():
        links = values(soup, ("script", "src"), ("img", "src"))
        for tag in soup.find_all("link"):
            if set(tag.get_attribute_list("rel")) & {"stylesheet", "preload", "icon"}:
                links.append(str(tag["href"]))
        files = {page, *(target(page, link)[0] for link in links if is_local(link))}
        if len(files) > 1:  # a page with a style sheet loads its font
            files.add(HTML / ICONS)
        weight = sum(len(gzip.compress(file.read_bytes())) for file in files)
        if weight > WEIGHT_LIMIT:
            heavy[str(page.relative_to(HTML))] = weight

    assert not heavy


def test_drawn_bits_are_printed_on_the_same_page(soups: Soups) -> None:
    """A bit pattern in a drawing is also in an executed block's output, bit by bit."""
    drawn = 0
    for page, soup in soups.items():
        # A block's output, where a status line stands under it: the block was run.
        outputs = [
            line.strip()
            for block in soup.select("div.highlight-none:has(+ div.verified)")
            for line in block.get_text().splitlines()
        ]
        words = {word for line in outputs for word in line.split()}
        for picture in soup.select(".hb-bits"):
            drawn += 1
            bits = "".join(cell.get_text() for cell in picture.select("b"))

            assert bits in words, f"{page.relative_to(HTML)} draws {bits}"
            assert picture["aria-label"]

    assert drawn
