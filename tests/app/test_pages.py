"""Pages over HTTP: every one opens, says what is wrong in words, escapes what it is given, and stays inside."""

import json
import re
import urllib.error
import urllib.request
import zipfile
from io import BytesIO

import pytest
from inspected import HOSTILE, write_sweep

PAGES = (
    "/", "/?q=dream", "/run?run=doses", "/run?run=broken", "/rows?run=sweep", "/rows?run=sweep&sort=-strength&q=prompt",
    "/grid?run=sweep", "/grid?run=sweep&x=method&y=strength&base=none&f.seed=0", "/curves?run=sweep",
    "/curves?run=doses&table=summary:methods&by=none", "/features", "/features?feature=1&kind=raw&t=750", "/dynamics",
    "/dynamics?run=vae&channel=1&stat=std", "/weights?run=weights&adapter=5", "/live", "/compare?pick=doses&pick=dream",
)  # fmt: skip


def get(address, path, headers=None, data=None):
    request = urllib.request.Request(address + path, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def post(address, action, given, **headers):
    sent = {"Content-Type": "application/json", **headers}
    return get(address, f"/live/{action}", sent, json.dumps(given).encode())


@pytest.mark.parametrize("path", PAGES)
def test_every_page_opens(address, path):
    status, headers, body = get(address, path)
    text = body.decode()
    assert status == 200
    assert "<h1>" in text
    assert HOSTILE not in text  # prompts and names are escaped
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_pages_show_what_was_written(address):
    runs = get(address, "/")[2].decode()
    assert "8 of 8 runs" in runs
    assert "half" in runs
    assert "broken" in runs
    assert "1 of 8 runs" in get(address, "/?q=dream&state=finished")[2].decode()
    rows = get(address, "/rows?run=sweep&f.method=prototype&f.strength=0.5..1")[2].decode()
    assert "12 of 36 rows" in rows
    grid = get(address, "/grid?run=sweep&x=strength&y=method")[2].decode()
    assert grid.count("data-zoom") == 8  # two methods, three strengths, and strength 0 beside all
    curves = get(address, "/curves?run=sweep&x=strength&y=target&by=method")[2].decode()
    assert curves.count('class="band') == 2
    assert "f.method=prototype" in curves  # a point leads to its rows
    feature = get(address, "/features?feature=1&kind=raw&t=700")[2].decode()
    assert "dream at step 20" in feature
    assert "step 10, activation 0.5" in feature
    assert 'class="heat"' in feature
    dynamics = get(address, "/dynamics?run=vae&channel=1")[2].decode()
    assert ">nudged<" in dynamics
    weights = get(address, "/weights?run=weights&adapter=5")[2].decode()
    assert weights.count("shape=ring") >= 3


def test_the_settings_of_two_runs_are_compared(address):
    text = get(address, "/compare?pick=doses&pick=dream")[2].decode()
    assert re.search(r'<tr class="strong"><th scope="row">seed</th><td>4</td><td>1</td>', text)
    assert get(address, "/compare?pick=doses")[0] == 400


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/nowhere", 404, "those of the menu"),
        ("/run?run=none", 404, "inside the results folder"),
        ("/run?run=../..", 404, "inside the results folder"),
        ("/grid?run=sweep&x=strenght", 400, "did you mean strength?"),
        ("/grid?run=sweep&size=999999999", 400, "32 to 512"),
        ("/rows?run=sweep&page=99999999999999999999999", 400, "page"),
        ("/rows?run=doses&table=metrics.parquet", 400, "cannot be read"),
        ("/rows?run=waiting", 404, "the same command continues it"),
        ("/features?feature=77", 404, "feature"),
        ("/dynamics?run=vae&site=x", 400, "norm1.output"),
        ("/live?s.a=1e300", 400, "-20 to 20"),
        ("/thumb/broken/run.json", 404, "picture"),
        ("/file/..%2f..%2fetc%2fpasswd", 404, "inside the results folder"),
        ("/file/sweep/shards", 404, "file of the results"),
        ("/run?run=" + "x" * 9000, 414, "too long"),
    ],
)
def test_what_cannot_be_shown_is_said_in_words(address, path, status, words):
    found, _, body = get(address, path)
    assert found == status
    assert words in body.decode()
    assert "Traceback" not in body.decode()


def test_pictures_tables_and_reports_are_served_safely(address, results):
    picture = next((results / "sweep" / "images").rglob("*.png")).relative_to(results)
    status, headers, body = get(address, f"/thumb/{picture}?s=32")
    assert (status, headers["Content-Type"], body[:4]) == (200, "image/png", b"\x89PNG")
    assert len(body) < 1000
    status, headers, _ = get(address, "/file/doses/report.html")
    assert status == 200
    assert "sandbox" in headers["Content-Security-Policy"]
    status, _, body = get(address, "/rows.csv?run=sweep&f.method=prototype")
    assert status == 200
    assert len(body.decode().strip().splitlines()) == 19
    status, headers, body = get(address, "/heat.png?run=vae&training=baseline-seed1&site=norm1.output&stat=mean")
    assert (status, body[:4]) == (200, b"\x89PNG")


def test_other_hosts_and_other_pages_are_refused(address):
    assert get(address, "/", {"Host": "evil.example"})[0] == 421
    status, _, body = post(address, "show", {"prompts": "a", "seed": 0}, Origin="http://evil.example")
    assert (status, body) == (403, b"requests from other pages are refused")
    assert get(address, "/live/show", {"Content-Type": "text/plain"}, b"{}")[0] == 415
    assert post(address, "show", {"prompts": "x" * 70_000})[0] == 413


def test_tables_opened_as_spreadsheets_run_no_formulas():
    from pysteer.recipes.flat import harmless

    assert [harmless(v) for v in ("=1+1", "fine", -2.0, "@x")] == ["'=1+1", "fine", -2.0, "'@x"]


def test_live_steers_without_attaching_again(address, inspector):
    status, _, body = post(address, "fit", {"source": "red", "target": "blue", "method": "mean_difference",
                                            "site": "ca", "pairs": 4})  # fmt: skip
    assert status == 200, body
    fitted = json.loads(body)
    assert fitted == {"part": "red-to-blue-mean-difference", "groups": ["ca"]}
    slider = f"{fitted['part']}/ca"
    shown = {}
    for strength in (0.0, 5.0, 10.0, 0.0):
        given = {"prompts": "a red circle", "seed": 3, "strengths": {slider: strength}}
        answer = json.loads(post(address, "show", given)[2])
        shown.setdefault(strength, []).append(answer)
    assert shown[0.0][0]["steered"] == shown[0.0][0]["plain"] == shown[0.0][1]["steered"]
    assert shown[5.0][0]["steered"] != shown[0.0][0]["steered"] != shown[10.0][0]["steered"]
    assert {one["attached"] for every in shown.values() for one in every} == {shown[0.0][0]["attached"]}
    status, _, body = post(address, "archive", {"prompts": "a red circle", "seed": 3, "strengths": {slider: 5.0}})
    archive = zipfile.ZipFile(BytesIO(body))
    names = {"steer.py", "plan.json", f"{fitted['part']}/config.json", f"{fitted['part']}/parameters.safetensors"}
    assert set(archive.namelist()) == names
    assert json.loads(archive.read("plan.json"))["strengths"] == {slider: 5.0}
    program = archive.read("steer.py").decode()
    assert program == json.loads(post(address, "code", {"prompts": "a red circle", "seed": 3,
                                                        "strengths": {slider: 5.0}})[2])["code"]  # fmt: skip
    _run_exported(archive, program, inspector, shown[5.0][0]["steered"][0])
    assert post(address, "remove", {"part": fitted["part"]})[0] == 200
    assert inspector.live.parts == []


def _run_exported(archive, program, inspector, wanted):
    """The exported program makes the image that the page showed."""
    import base64
    import contextlib
    import tempfile
    from unittest import mock

    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), inspector.live._lock:
        inspector.live._detach()  # the program attaches a plan to the same model
        archive.extractall(folder)
        names = {}
        with mock.patch("pysteer.models.load.load_model", return_value=inspector.live._pipe):
            exec(compile(program, "steer.py", "exec"), names)
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(wanted.partition(",")[2]))))
    assert (names["images"][0].numpy() == pixels).all()


@pytest.mark.parametrize(
    ("action", "given", "words"),
    [
        ("show", {"prompts": "", "seed": 0}, "prompts"),
        ("show", {"prompts": "a\n" * 9, "seed": 0}, "1 to 8"),
        ("show", {"prompts": "x" * 301, "seed": 0}, "300"),
        ("show", {"prompts": "a", "seed": -1}, "seed"),
        ("show", {"prompts": "a", "seed": 0, "strengths": {"x/y": 1e9}}, "-20 to 20"),
        ("show", {"prompts": "a", "seed": "many"}, "many"),
        ("fit", {"source": "red", "target": "purpleish", "method": "mean_difference"}, "purpleish"),
        ("fit", {"source": "red", "target": "blue", "method": "mean_diference", "pairs": 4}, "mean_difference"),
        ("fit", {"source": "red", "target": "blue", "method": "mean_difference", "pairs": 10**9}, "2 to 256"),
        ("open", {"folder": "../.."}, "inside the results folder"),
        ("explode", {}, "action"),
    ],
)
def test_live_refuses_what_it_cannot_use(address, action, given, words):
    status, _, body = post(address, action, given)
    assert status in (400, 404)
    assert words in json.loads(body)["problem"]


def test_pages_of_an_empty_folder_say_how_to_fill_it(tmp_path):
    from pysteer.app.live import Live
    from pysteer.app.pages import Query, curves_page, dynamics_page, features_page, grid_page, runs_page, weights_page
    from pysteer.app.server import Inspector
    from pysteer.app.store import Results

    app = Inspector(Results(tmp_path), Live())
    for name, make in (("runs", runs_page), ("grid", grid_page), ("curves", curves_page), ("features", features_page),
                       ("dynamics", dynamics_page), ("weights", weights_page)):  # fmt: skip
        text = app._render(f"{name}.html", page=name, **make(app, Query()))
        assert 'class="problem"' in text, name


def test_a_sweep_that_is_the_folder_itself_is_shown(tmp_path):
    from pysteer.app.live import Live
    from pysteer.app.pages import Query, grid_page
    from pysteer.app.server import Inspector
    from pysteer.app.store import Results

    write_sweep(tmp_path)
    app = Inspector(Results(tmp_path), Live())
    text = app._render("grid.html", page="grid", **grid_page(app, Query()))
    assert re.search(r'src="/thumb/images/\w\w/\w+\.png', text)


def test_parameters_that_are_given_have_sliders_from_the_start(tmp_path):
    import torch

    from pysteer.app.live import Live
    from pysteer.app.pages.live import live_page
    from pysteer.app.pages.query import Query
    from pysteer.app.server import Inspector
    from pysteer.app.store import Results
    from pysteer.capture import Fitted
    from pysteer.errors import InputError
    from pysteer.methods import MeanDifference
    from pysteer.steering import SiteParameters

    shift = SiteParameters("ca.0", "affine_shift", None, {"gain": torch.ones(1, 8), "bias": torch.ones(1, 8)})
    Fitted(MeanDifference(), [shift]).save_pretrained(tmp_path / "learned")
    live = Live("infinity-shapes", [tmp_path / "learned"])
    (part,) = live_page(Inspector(Results(tmp_path), live), Query({}))["parts"]
    assert (part.name, part.groups) == ("learned", ["ca"])
    assert not live.loaded
    with pytest.raises(InputError, match="nothing"):
        Live("infinity-shapes", [tmp_path / "nothing"])
