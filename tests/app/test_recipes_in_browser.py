"""The inspector in a browser over what recipes and a sweep really left, made in the test run."""

import json
from importlib.util import find_spec

import pytest
from browsing import CHROMIUM, loaded, opened, shoot

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed"),
    pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed"),
]
RECIPES = ("act-image", "dream", "vae-dynamics", "weightspace")
SWEEP = ["pair=red->blue", "method=mean_difference,prototype:clusters=8", "site=text", "strength=0,1", "prompts=2",
         "fit_pairs=8"]  # fmt: skip


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """Results of the notebooks' first cells, and of a small sweep."""
    from pysteer.sweep import plan_sweep, run_sweep
    from pysteer.sweep.page import write_page

    place = tmp_path_factory.mktemp("made") / "examples" / "notebooks"
    place.mkdir(parents=True)
    (place.parent / "weightspace").symlink_to(root / "examples" / "weightspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in RECIPES:
            text = (root / "examples" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
            first = next(cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
            exec(compile("".join(first["source"]), f"{name}.ipynb", "exec"), {})
        run_sweep(plan_sweep("images", SWEEP), place / "results" / "shapes", words=SWEEP)
        write_page(place / "results" / "shapes")
    return place / "results"


@pytest.fixture(scope="module")
def site(made):
    from pysteer.app.server import serve_in_background

    return serve_in_background(made)


@pytest.fixture
def page(browser, site):
    with opened(browser) as page:
        yield page


def test_every_run_is_there_with_its_figures(page, site, made, root):
    page.goto(site)
    assert page.locator("#runs tbody tr").count() == len(RECIPES) + 1
    assert page.locator("#runs .state").all_inner_texts() == ["finished"] * (len(RECIPES) + 1)
    for name in RECIPES:
        page.goto(f"{site}/run?run={name}")
        assert page.locator("h1").inner_text() == name
        assert all(width > 32 for width in loaded(page, ".figures img"))
        for form in ("svg", "csv"):
            if list((made / name / "figures").glob(f"*.{form}")):
                assert page.get_by_role("link", name=form.upper(), exact=True).count() >= 1
    page.goto(f"{site}/run?run=dream")
    shoot(page, root, "made-run")


def test_the_grid_and_the_curves_show_the_sweep(page, site, root):
    page.goto(f"{site}/grid?run=shapes")
    widths = loaded(page, "#grid img")
    assert len(widths) == 2 * 3  # two prompts, two strengths and the unsteered one beside them
    assert set(widths) == {64}
    shoot(page, root, "made-grid")
    page.locator("select[name='f.method']").select_option("mean_difference")
    page.wait_for_url("**f.method=mean_difference**")
    assert "4 of 8 rows" in page.locator("#count").inner_text()
    page.goto(f"{site}/curves?run=shapes")
    assert page.locator("svg.chart").count() == 2
    page.locator("svg.chart a").last.click()
    page.wait_for_url("**/rows**")
    assert all(width == 64 for width in loaded(page, "#rows tbody img"))


def test_features_dynamics_and_weight_space_show_the_recipes(page, site, root):
    page.goto(f"{site}/features?feature=0")
    assert all(width == 64 for width in loaded(page, ".frames figure:visible img"))
    page.goto(f"{site}/dynamics")  # a single training lies in the folder of the run itself
    assert loaded(page, "img.map") != [0]
    assert "dead channels" in page.locator("#count").inner_text()
    assert page.locator("svg.chart").count() >= 2
    shoot(page, root, "made-dynamics")
    page.goto(f"{site}/weights?adapter=3")
    assert page.locator("svg.chart a").count() == 100
    assert page.locator("svg.chart circle.here").count() == 1
    assert page.locator("#near tbody tr").count() == 12


def test_what_a_run_fitted_steers_on_the_live_page(page, site, made, root):
    page.goto(f"{site}/live")
    page.get_by_text("Open what a run fitted").click()
    fits = page.get_by_label("Parameters").locator("option").all_inner_texts()
    assert any(name.startswith("shapes/fits/") for name in fits)
    assert "act-image/fits/prototype" in fits
    page.get_by_label("Parameters").select_option("act-image/fits/prototype")
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector("[data-strength]")
    page.locator("#sliders input[type=range]").fill("1")
    page.wait_for_selector("#steered img")
    assert page.locator("#steered img").get_attribute("src") != page.locator("#plain img").get_attribute("src")
    shoot(page, root, "made-live")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_are_whole_in_both_schemes(browser, made, root, scheme):
    grounds = set()
    for folder in sorted(path.parent for path in made.glob("*/report.html")):
        with opened(browser) as page:
            page.emulate_media(color_scheme=scheme)
            page.goto((folder / "report.html").as_uri())
            assert all(width > 1 for width in page.evaluate("[...document.images].map(image => image.naturalWidth)"))
            assert page.evaluate("[...document.images].every(image => image.alt.length > 10)")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing runs off the page
            ink, ground = page.evaluate(
                "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] })()"
            )
            assert contrast(ink, ground) > 7
            soft = page.evaluate("getComputedStyle(document.querySelector('footer')).color")
            assert contrast(soft, ground) > 4.5
            grounds.add(ground)
            shoot(page, root, f"report-{folder.name}-{scheme}")
    assert len(grounds) == 1
    assert len(list(made.glob("*/report.html"))) == len(RECIPES) + 1


def contrast(one, other):
    """Ratio of the luminances of two colours `rgb(r, g, b)`, as WCAG defines it."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
