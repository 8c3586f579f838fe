"""Scenes, captions, pairs and the word tokenizer."""

from collections import Counter

import pytest

from pysteer.errors import InputError
from pysteer.zoo.shapes.captions import (
    ATTRIBUTES,
    COLOURS,
    IMAGE_SIDE,
    JITTER,
    MAX_TOKENS,
    NEUTRALS,
    RADIUS,
    REACH,
    SIZES,
    STEP,
    build_text_tokenizer,
    cell_position,
    compatible,
    offset_of,
    parse_caption,
    sample_pairs,
    sample_scenes,
    swap,
    vocabulary,
)

SCENES = sample_scenes(3000, 1)


def test_same_seed_same_scenes():
    assert sample_scenes(50, 7) == sample_scenes(50, 7)
    assert sample_scenes(50, 7) != sample_scenes(50, 8)


def test_captions_say_what_the_scene_is():
    for scene in SCENES:
        stated = parse_caption(scene.caption)
        assert set(stated) == set(scene.stated)
        assert all(getattr(scene, name) == value for name, value in stated.items())


def test_example_captions():
    assert parse_caption("a red circle") == {"colour": "red", "shape": "circle"}
    full = parse_caption("a small blue star at the left on a white background")
    assert full == {"size": "small", "colour": "blue", "shape": "star", "position": "left", "background": "white"}


@pytest.mark.parametrize(
    "caption", ["", "a dog", "red circle", "a red", "a circle red", "a circle on a brown background"]
)
def test_a_caption_outside_the_grammar_is_named(caption):
    with pytest.raises(InputError, match="caption"):
        parse_caption(caption)


def test_every_object_lies_two_pixels_inside_and_on_its_cell():
    for scene in SCENES:
        low, high = RADIUS[scene.size]
        assert low <= scene.radius <= high
        for centre in (scene.x, scene.y):
            assert centre - scene.radius >= 2
            assert centre + scene.radius <= IMAGE_SIDE - 2
            off = (centre - IMAGE_SIDE / 2) / STEP
            assert abs(round(off)) <= REACH[scene.size]
            assert abs(off - round(off)) * STEP <= JITTER
        if "position" in scene.stated:
            column, row = offset_of(scene.position, scene.size)
            assert abs(scene.x - IMAGE_SIDE / 2 - STEP * column) <= JITTER
            assert abs(scene.y - IMAGE_SIDE / 2 - STEP * row) <= JITTER


def test_position_words():
    assert cell_position("small", 0, 0) == "center"
    assert cell_position("small", -2, 0) == "left"
    assert cell_position("small", -1, 0) == ""
    assert cell_position("large", 0, 1) == "bottom"
    assert cell_position("medium", 1, 1) == ""


def test_colours_are_told_apart_and_unstated_backgrounds_are_neutral():
    for scene in SCENES:
        assert compatible(scene.colour, scene.background)
        if "background" not in scene.stated:
            assert scene.background in NEUTRALS
    assert not compatible("orange", "yellow")
    assert not compatible("blue", "purple")
    assert not compatible("red", "red")
    assert compatible("red", "blue")
    assert compatible("yellow", "white")


def test_balance():
    for name, words in (("size", SIZES), ("shape", ATTRIBUTES["shape"]), ("colour", COLOURS)):
        counts = Counter(getattr(scene, name) for scene in SCENES)
        expected = len(SCENES) / len(words)
        assert set(counts) == set(words)
        assert all(0.75 * expected < count < 1.25 * expected for count in counts.values())
    assert 0.85 < sum("colour" in s.stated for s in SCENES) / len(SCENES) <= 0.98
    assert 0.75 < sum("position" in s.stated for s in SCENES) / len(SCENES) < 0.85


def test_swap_changes_one_attribute_only():
    for source, target in sample_pairs(200, "colour", "red", "blue", 3):
        assert (source.colour, target.colour) == ("red", "blue")
        assert target.caption == source.caption.replace(" red ", " blue ", 1)
        assert (source.x, source.y, source.radius, source.shape) == (target.x, target.y, target.radius, target.shape)
        assert compatible("blue", source.background)
        assert compatible("red", source.background)


def test_swap_refuses_what_it_cannot_draw():
    scene = sample_scenes(1, 0, {"colour": "red", "background": "purple"})[0]
    with pytest.raises(InputError, match="blue on purple"):
        swap(scene, "colour", "blue")
    with pytest.raises(InputError, match="allowed: shape, colour, background"):
        swap(scene, "size", "small")
    with pytest.raises(InputError, match="brown"):
        swap(scene, "colour", "brown")
    with pytest.raises(InputError, match="red on red"):
        sample_scenes(1, 0, {"colour": "red", "background": "red"})


def test_text_tokenizer_round_trip():
    tokenizer = build_text_tokenizer()
    captions = [scene.caption for scene in SCENES[:200]]
    batch = tokenizer(captions, padding=True)
    assert len(tokenizer) == len(vocabulary())
    for caption, ids, mask in zip(captions, batch["input_ids"], batch["attention_mask"], strict=True):
        length = sum(mask)
        assert length == len(caption.split()) + 1 <= MAX_TOKENS
        assert ids[length - 1] == tokenizer.eos_token_id
        assert set(ids[length:]) <= {tokenizer.pad_token_id}
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_text_tokenizer_lower_case_and_unknown_words():
    tokenizer = build_text_tokenizer()
    assert tokenizer("A RED circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert tokenizer("a brown circle")["input_ids"][1] == tokenizer.unk_token_id


def test_text_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    build_text_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    caption = "a small blue star at the left on a white background"
    assert again(caption)["input_ids"] == build_text_tokenizer()(caption)["input_ids"]
