import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from pysteer.errors import InputError
from pysteer.metrics import rate
from pysteer.report import (
    Bar,
    Details,
    DoseCurve,
    DosePoint,
    Facts,
    Figure,
    Paragraph,
    Report,
    Section,
    Table,
    control_bars,
    dose_response,
    png,
    render,
)
from pysteer.report.heatmap import heatmap

ATTACK = "<script>alert('x')</script> \"on load\" & 'q'"


def share(hits, total=100):
    return rate(torch.arange(total) < hits)


def curve(label="Text", scale=1.0):
    return DoseCurve(label, [DosePoint(s, share(round(60 * s)), share(98), scale * s) for s in (0.0, 0.5, 1.0)], 1.0)


def dot(colour):
    return png(Image.new("RGB", (4, 4), colour))


def page():
    figure = Figure(dot("red"), "a red dot", ATTACK, dark=dot("blue"))
    table = Table(ATTACK, ["setting", "target"], [[ATTACK, "1.0"], ["plain", "0.5"]], strong=[1])
    blocks = [Paragraph(ATTACK), Facts([(ATTACK, ATTACK, ATTACK)]), table, figure, Details(ATTACK, [Paragraph(ATTACK)])]
    return render(Report(ATTACK, ATTACK, [Section("one", ATTACK, blocks)], ATTACK))


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_nothing_from_outside_becomes_markup():
    reader = read(page())
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]
    assert sum(ATTACK in text for text in reader.text) >= 10


def test_page_needs_nothing_outside_itself():
    html = page()
    assert not re.search(r"(src|href|srcset)=\"(?!data:image/png;base64,|#)", html)
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_page_is_accessible():
    tags = read(page()).tags
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert [attrs["alt"] for attrs in images] == ["a red dot"]
    assert {attrs["scope"] for tag, attrs in tags if tag == "th"} == {"col", "row"}
    assert ("html", {"lang": "en"}) in tags
    assert [attrs["tabindex"] for tag, attrs in tags if attrs.get("role") == "region"] == ["0"]
    assert sum(tag == "h1" for tag, _ in tags) == 1


def test_dark_figure_is_offered_and_both_are_whole():
    html = page()
    found = re.findall(r"base64,([A-Za-z0-9+/=]+)", html)
    colours = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) for data in found]
    assert colours == [(0, 0, 255), (255, 0, 0)]
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("block", [Figure(dot("red"), " "), Table("t", ["a", "b"], [["1"]])])
def test_incomplete_blocks_are_refused(block):
    with pytest.raises(InputError):
        render(Report("t", "l", [Section("one", "One", [block])]))


def test_broken_anchor_is_refused():
    with pytest.raises(InputError, match="anchor"):
        render(Report("t", "l", [Section('a" onload="x', "One", [])]))


def test_figure_must_be_png():
    with pytest.raises(InputError, match="PNG"):
        render(Report("t", "l", [Section("one", "One", [Figure(b"GIF89a", "alt")])]))


def test_dose_response_draws_its_data():
    args = {"target_name": "square", "kept_name": "colour kept"}
    one = dose_response([curve()], ceiling=share(90), **args)
    two = dose_response([curve(), curve("Visual", 3.0)], ceiling=share(90), **args)
    dark = dose_response([curve()], ceiling=share(90), theme="dark", **args)
    assert one == dose_response([curve()], ceiling=share(90), **args)
    assert one != dose_response([curve()], ceiling=share(10), **args)
    assert Image.open(io.BytesIO(two)).width > Image.open(io.BytesIO(one)).width
    assert sum(Image.open(io.BytesIO(dark)).convert("RGB").getpixel((2, 2))) < 150
    with pytest.raises(InputError, match="at least one"):
        dose_response([], **args)
    near = DoseCurve("Text", [DosePoint(s, share(50), share(98), float("nan")) for s in (0.0, 1.0)])
    assert len(dose_response([near], **args).figure.axes) == 1  # distances that were not measured get no panel


def test_drawn_figures_stand_in_the_size_of_the_text_and_names_do_not_overlap():
    args = {"target_name": "square", "kept_name": "colour kept"}
    html = render(Report("t", "l", [Section("one", "One", [Figure(dose_response([curve()], **args), "a figure")])]))
    assert re.search(r'<img [^>]*width="614"', html)  # 6.4 inches of 96 pixels
    assert "width=" not in re.search(r"<img [^>]*>", page())[0]
    names = ["background=black", "colour=blue"]
    for columns, angle in ((names, 35), (["0", "1"], 0)):
        drawn = heatmap([[0.0, 1.0], [1.0, float("nan")]], names, columns, x="said", title="t")
        assert {label.get_rotation() for label in drawn.figure.axes[0].get_xticklabels()} == {angle}
        assert len(drawn.csv().decode().splitlines()) == 4  # a heading, and the cells that are there


def blue_pixels(data):
    colours = Image.open(io.BytesIO(data)).convert("RGB").getcolors(1 << 20)
    return {colour: count for count, colour in colours}[31, 111, 207]


def test_control_bars_are_as_long_as_the_rates():
    bars = [Bar("all", share(100), share(50)), Bar("none", share(0), share(50), "control")]
    full = blue_pixels(control_bars(bars, target_name="t", kept_name="k"))
    half = [Bar("all", share(50), share(90)), Bar("none", share(0), share(90), "control")]
    assert full > 1.8 * blue_pixels(control_bars(half, target_name="t", kept_name="k")) > 0


def test_figures_are_written_as_png_as_svg_and_as_table(tmp_path):
    from pysteer.files import write_bytes

    figure = Figure(dose_response([curve()], target_name="square", kept_name="colour"), "a figure")
    write_bytes(tmp_path / "strengths.png", figure.light)
    text = (tmp_path / "strengths.svg").read_text()
    assert (tmp_path / "strengths.png").read_bytes() == bytes(figure.light)
    assert "<svg" in text
    assert ">square</text>" in text  # words stay words
    rows = read_csv(tmp_path / "strengths.csv")
    assert [row["strength"] for row in rows] == ["0.0", "0.5", "1.0"]
    assert [float(row["target"]) for row in rows] == pytest.approx([0.0, 0.3, 0.6])
    assert [row["used"] for row in rows] == ["False", "False", "True"]
    assert float(rows[1]["target_low"]) < 0.3 < float(rows[1]["target_high"])
    write_bytes(tmp_path / "dot.png", dot("red"))
    assert sorted(path.name for path in tmp_path.glob("dot.*")) == ["dot.png"]


def test_a_figure_of_ones_own_is_read_off(tmp_path):
    from matplotlib.figure import Figure as Canvas

    from pysteer.files import write_bytes
    from pysteer.report.drawn import drawn

    canvas = Canvas()
    first, second = canvas.subplots(1, 2)
    first.plot([0, 1, 2], [5, 6, 7], label="=line")
    first.axhline(3.0)  # helps the eye, is no data
    first.scatter([4], [9], label="points")
    first.set(title="left", xlabel="step", ylabel="loss")
    second.bar([1, 2], [10, 20], label="bars")
    canvas.colorbar(second.imshow([[0.0, 1.0]]))
    write_bytes(tmp_path / "own.png", drawn(canvas))
    rows = read_csv(tmp_path / "own.csv")
    assert [(row["panel"], row["series"]) for row in rows[:4]] == [("left", "'=line")] * 3 + [("left", "points")]
    assert [(row["step"], row["loss"]) for row in rows[:4]] == [("0", "5"), ("1", "6"), ("2", "7"), ("4.0", "9.0")]
    assert [(float(row["x"]), float(row["y"])) for row in rows[4:]] == [(1.0, 10.0), (2.0, 20.0)]
    write_bytes(tmp_path / "bare.png", drawn(canvas, ()))  # its data lies elsewhere
    assert sorted(path.name for path in tmp_path.glob("bare.*")) == ["bare.png", "bare.svg"]


def test_every_figure_goes_through_one_function():
    """Elsewhere matplotlib writes nothing, but for pages of features with their pictures, and formats asked for."""
    root = Path(__file__).resolve().parent.parent.parent / "pysteer"
    found = {
        path.relative_to(root).as_posix(): text.count(".savefig(")
        for path in root.rglob("*.py")
        if ".savefig(" in (text := path.read_text(encoding="utf-8"))
    }
    assert found == {"report/drawn.py": 2, "recipes/dreaming/figures.py": 1, "recipes/frame.py": 1}
    for path in (root / "recipes").rglob("*.py"):
        assert not re.search(r"path\([^\n]*\)\.write_bytes\(", path.read_text(encoding="utf-8")), path
