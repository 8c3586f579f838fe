"""A folder of results in every state, made in the test run, and an inspector over it."""

import sys
import threading
import urllib.request
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

pytest.importorskip("starlette", reason="needs the extra ui: pip install 'pysteer-core[ui]'")
pytest.importorskip("uvicorn", reason="needs the extra ui: pip install 'pysteer-core[ui]'")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    from inspected import write_results

    return write_results(tmp_path_factory.mktemp("inspected") / "results")


@pytest.fixture(scope="session")
def inspector(results):
    from tiny_infinity import tiny_pipeline

    from pysteer.app.live import Live
    from pysteer.app.server import Inspector
    from pysteer.app.store import Results

    live = Live("infinity-shapes")
    live._pipe = tiny_pipeline()
    return Inspector(Results(results), live)


@pytest.fixture(scope="session")
def address(inspector):
    """Address of a running inspector; it lives as long as the tests."""
    from pysteer.app.server import serve

    opened, found = threading.Event(), []

    def told(where):
        found.append(where)
        opened.set()

    threading.Thread(target=serve, args=(inspector, "127.0.0.1", 0, told), daemon=True).start()
    assert opened.wait(60)
    with urllib.request.urlopen(found[0], timeout=60) as answer:
        assert answer.status == 200
    return found[0].rstrip("/")


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium."""
    from browsing import CHROMIUM
    from playwright import sync_api

    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
