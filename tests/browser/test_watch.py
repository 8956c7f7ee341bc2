"""The watch sees what it forbids."""

import pytest
from conftest import watched


def visit(browser, page_text, **options):
    """Open a page of this text and close it again, which judges it."""
    pages = watched(browser, **options)
    next(pages).set_content(page_text)
    next(pages, None)


def test_a_page_of_its_own_passes(browser):
    visit(browser, "<p>hello</p><script>console.log('here'); console.warn('careful')</script>")


def test_a_request_to_another_machine_fails_its_test(browser):
    with pytest.raises(AssertionError, match=r"left the machine.*elsewhere\.example/a\.png"):
        visit(browser, "<img src='http://elsewhere.example/a.png'>")
    with pytest.raises(AssertionError, match=r"left the machine.*elsewhere\.example/talk"):
        visit(browser, "<script>new WebSocket('ws://elsewhere.example/talk')</script>")


def test_an_error_in_the_page_fails_its_test(browser):
    with pytest.raises(AssertionError, match=r"errors in the page.*out of cheese"):
        visit(browser, "<script>console.error('out of cheese')</script>")
    with pytest.raises(AssertionError, match=r"errors in the page.*nothing_of_the_kind"):
        visit(browser, "<script>nothing_of_the_kind()</script>")
    visit(browser, "<script>console.error('out of cheese')</script>", allowed=("out of cheese",))
