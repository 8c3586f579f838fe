import json
import random

import pytest

from pysteer.errors import InputError
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.data import Pair, draw_pair, parse_pair, read_pair
from pysteer.zoo.shapes.captions import parse_caption


def derive(*keys):
    return random.Random(repr(keys)).randrange(2**31)


def test_pair_words():
    assert parse_pair("circle->square", 1) == Pair("shape", "circle", "square")
    assert parse_pair("Red -> Blue", 0) == Pair("colour", "blue", "red")
    for bad in ("circle", "circle->blue", "red->red", "->", "cat->dog"):
        with pytest.raises(InputError):
            parse_pair(bad, 1)


@pytest.mark.parametrize("name", ["circle->square", "red->blue"])
def test_drawn_prompts_differ_in_the_class_word_only_and_test_is_not_fitted_on(name):
    config = PrototypeConfig()
    pair = parse_pair(name, 1)
    data = draw_pair(pair, config, derive)
    assert (len(data.fit), len(data.test)) == (192, 304)
    for prompts in (data.fit, data.test):
        assert [s.replace(pair.source, pair.target) for s in prompts.source] == prompts.target
        assert all(parse_caption(s)[pair.attribute] == pair.source for s in prompts.source)
        assert len(set(prompts.seeds)) == len(prompts)
    assert not set(data.fit.source) & set(data.test.source)
    assert not set(data.fit.seeds) & set(data.test.seeds)
    assert len(set(data.test.source)) == 304
    assert pair.source not in data.others
    everything = {*data.gate, *(prompt for group in data.others.values() for prompt in group)}
    assert len(everything) > 600
    assert not everything & {*data.test.source, *data.bystanders.source}
    assert 150 < len(data.negatives(192)) < 210
    assert set(data.negatives(192)) <= everything - set(data.gate)
    assert pair.target in data.others
    assert len(data.bystanders) == 96
    assert all(parse_caption(p)[pair.attribute] != pair.source for p in data.bystanders.source)
    assert draw_pair(pair, config, derive) == data


def write(tmp_path, values):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(values))
    return str(path)


CIRCLES = [f"a {c} circle" for c in ("red", "blue", "green", "pink", "cyan")]
SQUARES = [prompt.replace("circle", "square") for prompt in CIRCLES]


@pytest.mark.parametrize(
    "values",
    [
        {"classes": ["circle", "square"], "prompts": {"0": CIRCLES, "1": SQUARES}},
        {"circle": CIRCLES, "square": SQUARES},
        [{"prompt": p, "label": i} for i, group in enumerate((CIRCLES, SQUARES)) for p in group],
    ],
)
def test_every_form_of_prompts_file(tmp_path, values):
    config = PrototypeConfig(prompts=9, fit_pairs=4)
    data = read_pair(config, write(tmp_path, values), derive)
    assert data.pair == Pair("shape", "circle", "square")
    assert not set(data.fit.source) & set(data.test.source)
    assert [s.replace("circle", "square") for s in data.test.source] == data.test.target
    assert (len(data.fit), len(data.test), len(set(data.test.seeds))) == (4, 9, 9)
    turned = read_pair(PrototypeConfig(prompts=9, variant=0), write(tmp_path, values), derive)
    assert turned.pair == Pair("shape", "square", "circle")
    assert turned.test.source[0].endswith("square")


def test_classes_of_another_dataset_keep_their_names(tmp_path):
    values = {"dog": ["a dog", "a big dog", "dog"], "cat": ["a cat", "a big cat"] * 3}
    config = PrototypeConfig(dataset="dogs_cats", dataset_path="x", prompts=4)
    data = read_pair(config, write(tmp_path, values), derive)
    assert data.pair == Pair("class", "dog", "cat")
    assert not data.test.paired


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a circle"], "allowed"),
        ({"circle": CIRCLES}, "allowed"),
        ({"circle": CIRCLES, "square": ["a square", 3, "b"]}, "class square"),
        ({"circle": CIRCLES, "square": SQUARES[:2]}, "at least 3"),
        ({"circle": CIRCLES, "square": CIRCLES}, "differ in their shape"),
        ({"circle": CIRCLES, "square": ["a dog"] * 4}, "a dog"),
        ([{"prompt": "a circle", "label": 2}], "label"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        read_pair(PrototypeConfig(), write(tmp_path, values), derive)


def test_a_prompts_file_that_is_not_json(tmp_path):
    (tmp_path / "p.json").write_text("a circle\na square")
    with pytest.raises(InputError, match="prompts file is not JSON"):
        read_pair(PrototypeConfig(), str(tmp_path / "p.json"), derive)
