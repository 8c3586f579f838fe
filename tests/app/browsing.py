"""A browser page whose console must stay free of errors, pictures of pages, and pictures on pages."""

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@contextmanager
def opened(browser):
    """A page; errors of its console, of its scripts and of its requests fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # left for another page before it came
            errors.append(f"{request.url}: {request.failure}")

    page.on("requestfailed", failed)
    page.on(
        "response", lambda answer: errors.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None
    )
    yield page
    assert errors == []
    assert page.evaluate("window.hacked") is None
    page.close()


def shoot(page, root, name):
    """Keep a picture of the page."""
    folder = Path(os.environ.get("PYSTEER_SCREENSHOTS") or root / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def loaded(page, selector):
    """Natural widths of the pictures of a selector, once all are there; lazy ones are scrolled to."""
    images = page.locator(selector)
    for one in images.all():
        one.scroll_into_view_if_needed()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        widths = images.evaluate_all("all => all.map(image => image.complete ? image.naturalWidth : -1)")
        if widths and -1 not in widths:
            return widths
        page.wait_for_timeout(50)
    raise AssertionError(f"{selector}: {widths}")
