"""The inspector in a browser (Debian's Chromium): every page, filters, pictures, sliders, the address, no errors.

Screenshots of every page go to `build/screenshots`, or to the folder that PYSTEER_SCREENSHOTS names.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page whose console must stay free of errors."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "requestfailed",
        lambda request: (
            errors.append(f"{request.url}: {request.failure}")
            if (
                request.failure != "net::ERR_ABORTED"  # left for another page before it came
            )
            else None
        ),
    )
    page.on(
        "response", lambda answer: errors.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None
    )
    yield page
    assert errors == []
    assert page.evaluate("window.hacked") is None
    page.close()


def shoot(page, root, name):
    folder = Path(os.environ.get("PYSTEER_SCREENSHOTS") or root / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def loaded(page, selector):
    """Natural widths of the pictures of a selector, once all are there."""
    page.wait_for_function(
        "s => { const all = [...document.querySelectorAll(s)]; return all.length && all.every(i => i.complete) }",
        arg=selector,
    )
    return page.eval_on_selector_all(selector, "images => images.map(image => image.naturalWidth)")


def test_runs_are_searched_filtered_and_compared(page, address, root):
    page.goto(address)
    assert page.locator("#runs tbody tr").count() == 8
    shoot(page, root, "runs")
    page.get_by_label("State").select_option("broken")
    page.wait_for_url("**state=broken**")
    assert page.locator("#runs tbody tr").count() == 2
    page.reload()  # the address holds the state
    assert page.get_by_label("State").input_value() == "broken"
    page.goto(f"{address}/?q=seed")
    page.get_by_label("Pick doses to compare").check()
    page.get_by_label("Pick dream to compare").check()
    page.get_by_role("button", name="Compare the picked runs").click()
    page.wait_for_url("**/compare**")
    assert page.locator("#differences tr.strong").count() >= 1
    page.get_by_role("link", name="doses").click()
    assert page.locator("h1").inner_text() == "doses"


def test_grid_changes_axes_zooms_and_restores(page, address, root):
    page.goto(f"{address}/grid?run=sweep&x=strength&y=method")
    assert all(width == 64 for width in loaded(page, "#grid img"))
    shoot(page, root, "grid")
    page.get_by_label("Across").select_option("seed")
    page.wait_for_url("**x=seed**")
    page.goto(f"{address}/grid?run=sweep&x=strength&y=method&f.seed=1")
    assert page.locator("select[name='f.seed']").input_value() == "1"
    before = page.locator("#grid img").first.bounding_box()["width"]
    page.locator("[data-size]").fill("192")
    page.wait_for_url("**size=192**")
    assert page.locator("#grid img").first.bounding_box()["width"] == 192 != before
    page.locator("#grid tbody tr").first.locator("button").last.click()
    assert page.locator("dialog[open] img").count() == 2  # with the unsteered one beside it
    assert "strength 1" in page.locator("dialog p").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_a_point_of_a_curve_leads_to_its_pictures(page, address, root):
    page.goto(f"{address}/curves?run=sweep")
    assert page.locator("svg.chart").count() >= 2
    shoot(page, root, "curves")
    page.get_by_label("A curve per").select_option("none")
    page.wait_for_url("**by=none**")
    page.locator("svg.chart a").last.click()
    page.wait_for_url("**/rows**")
    assert re.search(r"12 of 36 rows", page.locator("#count").inner_text())
    assert all(width == 64 for width in loaded(page, "#rows tbody img"))


def test_features_are_sorted_searched_and_dreams_move(page, address, root):
    page.goto(f"{address}/features")
    assert page.locator("#features li").count() == 5
    page.get_by_label("Search").fill("ring")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=ring**")
    assert page.locator("#features li").count() == 2
    page.goto(f"{address}/features?feature=1&kind=raw")
    shown = page.locator(".frames figure:visible figcaption")
    assert "step 20" in shown.inner_text()
    page.locator(".dream input").fill("0")
    assert "step 0" in shown.inner_text()
    assert page.locator(".heat rect:visible").count() > 0
    page.get_by_label("Show where").uncheck()
    assert page.locator(".heat:visible").count() == 0
    shoot(page, root, "feature")
    page.get_by_role("link", name="750").first.click()
    page.wait_for_url("**t=750**")
    page.locator("a[rel=prev], a[rel=next]").first.click()
    page.wait_for_function("!document.querySelector('#feature').textContent.includes('Feature 1')")
    page.get_by_label("sae").check()
    page.wait_for_url("**kind=sae**")


def test_dynamics_and_weight_space(page, address, root):
    page.goto(f"{address}/dynamics")
    assert loaded(page, "img.map") == [18]  # three windows, six pixels each
    shoot(page, root, "dynamics")
    page.get_by_label("Statistic").select_option("std")
    page.wait_for_url("**stat=std**")
    page.goto(f"{address}/weights")
    shoot(page, root, "weights")
    page.locator("svg.chart a").nth(6).click()
    page.wait_for_url("**adapter=**")
    assert page.locator("#near tbody tr").count() == 7


def test_a_live_slider_changes_the_picture(page, address, root):
    page.goto(f"{address}/live")
    page.get_by_text("Fit a pair of classes").click()
    page.get_by_label("Site").fill("ca")
    page.get_by_label("Prompt pairs").fill("4")
    page.get_by_role("button", name="Fit").click()
    page.wait_for_selector("[data-strength]")
    page.get_by_role("button", name="Paint").click()
    page.wait_for_selector("#steered img")
    before = page.locator("#steered img").get_attribute("src")
    assert before == page.locator("#plain img").get_attribute("src")
    attached = page.locator("#status").get_attribute("data-attached")
    page.locator("[data-strength]").fill("12")
    page.locator("[data-strength]").dispatch_event("change")
    page.wait_for_function("old => document.querySelector('#steered img').src !== old", arg=before)
    assert page.locator("#plain img").get_attribute("src") == before
    assert page.locator("#status").get_attribute("data-attached") == attached  # nothing was built again
    shoot(page, root, "live")
    with page.expect_download() as found:
        page.get_by_role("button", name="Download plan").click()
    assert found.value.suggested_filename == "pysteer-plan.zip"
    page.get_by_role("button", name="Show as code").click()
    page.wait_for_selector("#program:visible")
    assert "strength=12.0" in page.locator("#program").inner_text()
    page.reload()  # the sliders stand where the address says
    assert page.locator("[data-strength]").input_value() == "12"
    page.get_by_role("button", name="Remove").click()
    page.wait_for_function("!document.querySelector('[data-strength]')")


def test_pages_work_by_keyboard_and_without_colour(page, address):
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert dark != page.evaluate("getComputedStyle(document.body).backgroundColor")
    for path in ("/", "/grid", "/curves", "/features", "/dynamics", "/weights", "/live"):
        page.goto(address + path)
        nameless = page.evaluate(
            "() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea, button')]"
            ".filter(e => !(e.labels && e.labels.length) && !e.ariaLabel && !e.textContent.trim()"
            " && !e.querySelector('img[alt]')).map(e => e.outerHTML)"
        )
        assert nameless == []
        assert page.evaluate("[...document.images].every(image => image.alt)")
