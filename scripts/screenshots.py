"""Pictures of the inspector for the README: docs/inspector-grid.png and docs/inspector-curves.png.

python scripts/screenshots.py RESULTS      # a folder with a sweep, for example made by
pysteer sweep images 'pair=red->blue' method=prototype:clusters=32,mean_difference site=text,visual \
    strength=0,0.5,1,1.5,2 prompts=4 fit_pairs=48 --name shapes --out RESULTS

Needs playwright and a Chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHOTS = {
    "inspector-grid": "/grid?run={run}&x=strength&y=prompt&size=112&f.method={method}&f.site=text",
    "inspector-curves": "/curves?run={run}&x=strength&y=target&by=method&damage=change",
}


def main() -> int:
    """Take the pictures."""
    from playwright.sync_api import sync_playwright

    from pysteer.app.server import serve_in_background

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--run", default="shapes", help="name of the sweep")
    parser.add_argument("--method", default="prototype:clusters=32", help="method shown in the grid")
    parser.add_argument("--out", type=Path, default=DOCS)
    asked = parser.parse_args()
    browser_path = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if browser_path is None:
        print("no Chromium here: apt-get install chromium", file=sys.stderr)
        return 2
    address = serve_in_background(asked.results)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 720})
        page.set_default_timeout(120_000)
        for name, path in SHOTS.items():
            answer = page.goto(address + path.format(run=asked.run, method=asked.method))
            assert answer is not None
            assert answer.ok, page.locator(".problem").inner_text()
            page.wait_for_load_state("networkidle")  # the page forbids scripts in strings, so it is not asked
            page.screenshot(path=asked.out / f"{name}.png")
            print(asked.out / f"{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
