import json

import pytest

from pysteer.errors import InputError
from pysteer.recipes.setup_file import ScaleSetup, Setup, parse_setup, read_setup, write_setup

# As printed in the description of the format, trailing comma included.
PRINTED = """
{
        "scales": {
            "0": {"layers": [-1], "strength_cond": 3.0, "strength_uncond": 1.0},
            "2": {"layers": [0, 3, 4], "strength_cond": 3.0, "strength_uncond": 1.0},
            "6": {"layers": [], "strength_cond": 0.0, "strength_uncond": 0.0}
        },
        "layers_text": [21, 22, 23],
        "strength_text": 5.0
    },
"""


def one(**entry):
    return {"scales": {"0": {"layers": [-1], "strength_cond": 1.0, "strength_uncond": 0.0, **entry}}}


def test_printed_example_is_read(tmp_path):
    (tmp_path / "setup.json").write_text(PRINTED)
    setup = read_setup(tmp_path / "setup.json")
    assert setup.scales[0] == ScaleSetup(None, 3.0, 1.0)
    assert setup.text_layers == (21, 22, 23)
    assert setup.text_strength == 5.0
    setup.check(scales=7, layers=12, text_layers=24)
    table = setup.strengths(12)
    assert table[0] == {0: (3.0, 1.0), 2: (3.0, 1.0)}
    assert table[1] == {0: (3.0, 1.0)}
    assert sorted(table) == list(range(12))


def test_round_trip(tmp_path):
    setup = Setup({0: ScaleSetup(None, 1.5, 0.0), 3: ScaleSetup((0, 5), 2.0, 1.0)}, (-1,), 0.5)
    assert read_setup(write_setup(tmp_path / "s.json", setup)) == setup
    without = Setup({0: ScaleSetup((), 0.0, 0.0)})
    assert read_setup(write_setup(tmp_path / "t.json", without)) == without


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((6, 12, 24), "scale.*got 6.*0 to 5"), ((7, 4, 24), "scale 2.*got 4.*0 to 3"), ((7, 12, 23), "text.*got 23")],
)
def test_places_the_model_does_not_have_are_named(sizes, words):
    with pytest.raises(InputError, match=words):
        parse_setup(json.loads(PRINTED.strip().rstrip(","))).check(*sizes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "object"),
        ({}, "missing key.*scales"),
        ({"scale": {}}, "did you mean scales"),
        ({"scales": {"x": {}}}, "whole number"),
        ({"scales": {"0": {"layers": [-1], "strength_cond": 1}}}, "missing key.*strength_uncond"),
        (one(strenght_cond=1), "did you mean strength_cond"),
        (one(layers=[-1, 2]), "got \\[-1, 2\\]"),
        (one(layers=[1, 1]), "different numbers"),
        (one(layers="all"), "'all'"),
        (one(strength_cond=float("nan")), "finite"),
        (one(strength_cond="3"), "'3'"),
        ({**one(), "strength_text": True}, "strength_text"),
    ],
)
def test_bad_setups_name_the_key(values, words):
    with pytest.raises(InputError, match=words):
        parse_setup(values)


def test_broken_files_are_one_line(tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(InputError, match="not found"):
        read_setup(path)
    path.write_text('{"scales": ')
    with pytest.raises(InputError, match="line 1 column") as caught:
        read_setup(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_setup(path)
