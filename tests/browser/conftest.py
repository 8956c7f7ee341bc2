"""A browser that watches: a page that asks another machine for anything, or writes an error to its console, fails its test."""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = ROOT / "build" / "browser"
VIEWPORTS = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
ALLOWED: tuple[str, ...] = ()  # regular expressions of console errors that say nothing of the page


class Watch:
    """What the pages of one browser context asked for and complained of.

    Args:
        context: of Playwright; its pages are watched from their first request on.
        allowed: regular expressions of console errors that are let pass.
    """

    def __init__(self, context, allowed=ALLOWED):
        self.allowed = allowed
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        context.on("request", lambda request: self._asked(request.url))
        context.on("console", self._said)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("page", lambda page: page.on("websocket", lambda socket: self._asked(socket.url)))

    def _asked(self, url):
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about", "file") and parts.hostname != "127.0.0.1":
            self.elsewhere.append(url)

    def _said(self, message):
        text = f"{message.text} ({message.location.get('url', '')})"
        if message.type == "error" and not any(re.search(pattern, text) for pattern in self.allowed):
            self.errors.append(text)

    def judge(self):
        assert not self.elsewhere, f"requests left the machine: {self.elsewhere}"
        assert not self.errors, f"errors in the page: {self.errors}"


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, headless; no name but 127.0.0.1 can be resolved in it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    # chromium's own sandbox refuses to run as root
    flags = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *["--no-sandbox"] * (os.geteuid() == 0)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


def watched(browser, allowed=ALLOWED, **options):
    """A page in a context of its own, judged when it is closed. For a fixture: `yield from`."""
    context = browser.new_context(**options)
    watch = Watch(context, allowed)
    page = context.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.wait_for_timeout(200)  # what the page said last is still on its way
    context.close()
    watch.judge()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What the page of a failed test looked like."""
    report = yield
    if call.when == "call" and report.failed:
        for name in ("desktop", "phone"):
            if name in item.funcargs:
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                item.funcargs[name].screenshot(path=SCREENSHOTS / f"failed_{item.name}.png")
    return report


@pytest.fixture
def desktop(browser):
    """A page of 1280 x 800."""
    yield from watched(browser, **VIEWPORTS["desktop"])


@pytest.fixture
def phone(browser):
    """A page of 390 x 844, with touch."""
    yield from watched(browser, **VIEWPORTS["phone"])


@pytest.fixture
def page(desktop):
    return desktop


@pytest.fixture
def shoot():
    """shoot(page, "name") writes build/browser/name.png."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return lambda page, name, **options: page.screenshot(path=SCREENSHOTS / f"{name}.png", **options)
