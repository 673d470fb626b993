"""What several files of tests need: a real browser, and a window of it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.widget import DESK

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start a browser without a window.

    Yields:
        The browser, which all tests share.
    """
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        pytest.skip("there is no Chromium or Chrome on this machine to open pages in")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open a fresh profile; a test may parametrize its options.

    Yields:
        The profile.
    """
    context = browser.new_context(**getattr(request, "param", {"viewport": DESK}))
    context.set_default_timeout(10_000)
    yield context
    context.close()
