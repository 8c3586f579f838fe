"""The inspector in a browser (Debian's Chromium): every page, filters, pictures, sliders, the address, no errors.

Screenshots of every page go to `build/screenshots`, or to the folder that PYSTEER_SCREENSHOTS names.
"""

import re

import pytest
from browsing import CHROMIUM, loaded, opened, shoot

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")


@pytest.fixture
def page(browser, address):
    with opened(browser) as page:
        yield page


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
    sync_api.expect(page.locator("#feature")).not_to_contain_text("Feature 1")
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
    page.locator("#sliders input[type=range]").fill("-3")  # the slider and the field beside it go together
    assert page.locator("[data-strength]").input_value() == "-3"
    page.locator("[data-strength]").fill("12")
    page.locator("[data-strength]").dispatch_event("change")
    page.wait_for_url("**=12**")
    page.reload()  # the sliders stand where the address says
    assert page.locator("[data-strength]").input_value() == "12"
    page.get_by_role("button", name="Remove").click()
    page.locator("[data-strength]").wait_for(state="detached")


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
