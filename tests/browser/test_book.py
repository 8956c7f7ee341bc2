"""The book as a reader walks it, served from this machine: search, links, mathematics, narrow screens, darkness."""

import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, VIEWPORTS, watched
from playwright.sync_api import expect

from hinv.companion import book

HTML = ROOT / "build" / "book" / "html"
SAMPLE = {  # name of the screenshot -> page
    "front": "index.html",
    "start": "start.html",
    "notebook": "notebooks/04_augmented.html",
    "training": "notebooks/09a_one_batch.html",
    "claims": "claims.html",
    "benchmarks": "benchmarks.html",
    "models": "models.html",
    "equations": "equations.html",
    "interface": "api/hinv.html",
    "source": "source/tests/test_paper.py.html",
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the book; it is built first where `make book` has not been called since something of it changed."""
    sources = [
        *ROOT.glob("*.md"),
        *(path for room in ("docs", "notebooks", "hinv") for path in (ROOT / room).rglob("*.*")),
    ]
    newest = max(path.stat().st_mtime for path in sources if "__pycache__" not in path.parts)
    front = HTML / "index.html"
    if not front.exists() or front.stat().st_mtime < newest:
        subprocess.run([sys.executable, "-m", "hinv.companion.book"], cwd=ROOT, check=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def rendered(page):
    """Wait until MathJax is done, and all of its formulas are formulas."""
    page.wait_for_load_state("networkidle")
    if page.locator("span.math, div.math").count():
        page.wait_for_selector("mjx-container", state="attached")
        page.wait_for_function("MathJax.startup.promise.then(() => true)")
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    left = page.locator("article").evaluate(
        """article => {
            const copy = article.cloneNode(true);
            copy.querySelectorAll('pre, code, script, style, mjx-container').forEach(e => e.remove());
            return copy.textContent.match(/\\$\\$|\\\\\\[|\\\\begin|\\\\frac|\\$[^$\\n]{1,60}\\$/g) || [];
        }"""
    )
    assert left == [], f"TeX that nobody rendered: {left}"
    assert page.locator("mjx-container", has_text="](").count() == 0, "Markdown inside a formula"


def fits(page):
    """The page itself does not scroll sideways."""
    wide = page.evaluate(
        """() => [...document.querySelectorAll('article *')].filter(e => {
            for (let p = e.parentElement; p; p = p.parentElement)
                if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) && p.tagName != 'HTML' && p.tagName != 'BODY') return false;
            return e.getBoundingClientRect().right > innerWidth + 1;
        }).slice(0, 3).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth"), wide
    assert wide == []


@pytest.fixture(params=["desktop", "phone", "dark", "dark phone"])
def seen(browser, request):
    """How a reader sees it, and a page."""
    options = VIEWPORTS["phone" if "phone" in request.param else "desktop"]
    pages = watched(browser, **options, color_scheme="dark" if "dark" in request.param else "light")
    yield request.param.replace(" ", "-"), next(pages)
    next(pages, None)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_page_is_whole(site, seen, shoot, name):
    how, page = seen
    page.goto(f"{site}/{SAMPLE[name]}")
    rendered(page)
    fits(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 18, 18)" if "dark" in how else "rgb(255, 255, 255)"
    )
    assert (
        page.locator("article img:not([src$='.svg'])").evaluate_all(
            "all => all.filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
        )
        == []
    )
    shoot(page, f"book-{name}-{how}")


def test_every_other_page_fits_a_phone(site, phone):
    """Whatever pages and notebooks there are; of the sources the sample holds one."""
    pages = [p for folder in (".", "notebooks", "howto", "api") for p in sorted((HTML / folder).glob("*.html"))]
    others = {p.relative_to(HTML).as_posix() for p in pages} - {*SAMPLE.values(), "search.html"}
    assert len(others) > 25
    for name in sorted(others):
        phone.goto(f"{site}/{name}")
        rendered(phone)
        fits(phone)


def test_search_finds_inertia(site, page, shoot):
    page.goto(f"{site}/index.html")
    page.locator(".bd-sidebar-primary .search-button-field").click()
    page.keyboard.type("inertia")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=inertia*")
    page.wait_for_selector("#search-results li a")
    for wanted in ("start.html", "notebooks/05_factorization.html", "api/"):  # the list fills one by one
        expect(page.locator(f"#search-results li a[href*='{wanted}']").first).to_be_attached()
    found = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    for wanted in ("start.html", "notebooks/05_factorization.html", "api/"):
        assert any(wanted in link for link in found), (wanted, found)
    shoot(page, "book-search")


def test_an_equation_lands_on_its_test(site, page, shoot):
    page.goto(f"{site}/equations.html")
    page.get_by_role("link", name="test_K_solves_the_unified_system").click()
    page.wait_for_url("**/source/tests/test_paper.py.html#*")
    target = page.locator(f"[id='{page.url.split('#')[1]}']")
    assert target.is_visible() and 0 <= target.bounding_box()["y"] < 400
    shown = page.locator(f"[id='{page.url.split('#')[1]}'] ~ div pre, [id='{page.url.split('#')[1]}'] pre").first
    assert "def test_K_solves_the_unified_system(" in shown.inner_text()
    shoot(page, "book-test-of-an-equation")


def test_an_equation_lands_on_itself_in_its_notebook(site, page):
    page.goto(f"{site}/equations.html")
    entry = page.locator("p", has_text="hinv.paper.Matrices.K").filter(has_text="test_K_solves_the_unified_system")
    entry.get_by_role("link", name="04", exact=True).click()
    page.wait_for_url("**/04_augmented.html#*")
    rendered(page)
    equation = page.locator(f"[id='{page.url.split('#')[1]}']")
    assert "13" in equation.locator("mjx-assistive-mml").inner_text() or "13" in equation.inner_html()


def test_claims_are_filtered(site, page, shoot):
    page.goto(f"{site}/claims.html")
    rows = page.locator(".claims tbody tr:visible")
    every = rows.count()
    page.locator(".claims input").fill("backpropagation")  # of a title, which is there without results, too
    few = rows.count()
    assert 0 < few < every
    assert all(
        "backpropagation" in f"{text}".lower()
        for text in page.locator("section:visible section:visible").all_inner_texts()
    )
    page.locator(".claims input").fill("no claim says this")
    assert rows.count() == 0
    shoot(page, "book-claims-filtered")


def test_the_download_is_the_notebook_itself(site, page):
    page.goto(f"{site}/notebooks/05_factorization.html")
    page.locator(".dropdown-download-buttons > button").click()
    with page.expect_download() as download:
        page.locator(".btn-download-source-button").click()
    text = download.value.path().read_text()
    origin = book.executed(ROOT / "notebooks" / "05_factorization.ipynb")
    assert text == origin.read_text() and "equation-05" not in text


def test_every_internal_link_and_anchor_exists(site):
    """All pages, read as text: files and ids that links name are there."""
    ids, links = {}, []
    for path in HTML.rglob("*.html"):
        if "_static" in path.parts:
            continue
        text = path.read_text("utf-8")
        ids[path] = set(re.findall(r"\bid=[\"']([^\"']+)[\"']", text))
        body = re.sub(r"<script.*?</script>|<pre.*?</pre>", "", text, flags=re.S)
        links += [(path, target) for target in re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", body)]
    lost = []
    for path, target in links:
        if re.match(r"(https?|mailto|data|javascript):", target):
            continue
        name, _, part = target.partition("#")
        there = (path.parent / name.partition("?")[0]).resolve() if name else path
        if not there.exists() or (part and there.suffix == ".html" and part not in ids[there]):
            lost.append(f"{path.relative_to(HTML)}: {target}")
    assert links and not lost, lost[:20]
