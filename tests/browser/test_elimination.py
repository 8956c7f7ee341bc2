"""The animated elimination, as a browser plays it."""

from conftest import ROOT

FILE = (ROOT / "docs" / "elimination.svg").as_uri()
SHOWN = """text => Math.max(...[...document.querySelectorAll('g')].filter(g => g.textContent.includes(text))
    .map(g => Number(getComputedStyle(g).opacity)))"""


def at(page, second):
    """Every animation held at this second."""
    page.evaluate("s => document.getAnimations().forEach(a => { a.pause(); a.currentTime = 1000 * s })", second)


def test_its_scenes_follow_one_another(page, shoot):
    page.goto(FILE)
    seconds = page.evaluate("document.getAnimations()[0].effect.getTiming().duration / 1000")
    assert 30 < seconds < 120
    captions = ["The chain matrix", "Layer 6 is", "Layer 1 is", "have the signs", "Now forwards", "is solved"]
    for second, caption in zip((2, 9, 39, 46, 54, seconds - 2), captions, strict=True):
        at(page, second)
        assert [page.evaluate(SHOWN, c) for c in captions] == [float(c == caption) for c in captions], second
        shoot(page, f"elimination_{second:02.0f}")


def test_it_moves_as_a_picture_too(page, tmp_path):
    """As a README shows it: in an <img>, where no script could run."""
    (tmp_path / "readme.html").write_text(f"<img src='{FILE}' width='900' height='580'>")
    page.goto((tmp_path / "readme.html").as_uri())
    page.wait_for_function("document.images[0].complete && document.images[0].naturalWidth > 0")
    first = page.screenshot()
    page.wait_for_timeout(10_000)  # past the opening
    assert page.screenshot() != first


def test_no_words_leave_the_picture(page):
    page.goto(FILE)
    ends = page.evaluate(
        "[...document.querySelectorAll('text')].map(t => { const b = t.getBBox(); return b.x + b.width })"
    )
    assert len(ends) > 40 and max(ends) < 895


def test_it_stands_still_for_who_wants_that(page, shoot):
    page.emulate_media(reduced_motion="reduce", color_scheme="dark")
    page.goto(FILE)
    assert page.evaluate("document.getAnimations().length") == 0
    assert page.evaluate(SHOWN, "is solved") == 1 and page.evaluate(SHOWN, "Now forwards") == 0
    shoot(page, "elimination_still_dark")
