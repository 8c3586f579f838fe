"""Tasks: what ships, the formats of data sets, own files, and what is refused."""

import json

import pytest

from pysteer.data.concepts import concept, concept_names, concept_sentences, openings
from pysteer.data.tasks import TaskSettings, load_task, toxicity_prompts
from pysteer.errors import InputError
from pysteer.metrics.concepts import concept_rate, mentions


@pytest.mark.parametrize("name", concept_names())
def test_concepts_ship_with_equal_classes(name) -> None:
    neutral, about = concept_sentences(name)
    assert len(neutral) == len(about) == len({*neutral, *about}) / 2
    assert concept_rate(neutral, concept(name).words).value == 0
    assert concept_rate(about, concept(name).words).value > 0.7
    task = load_task(TaskSettings(name))
    assert (task.source, task.target) == (neutral, about)
    assert not set(task.prompts) & set(task.search_prompts)


def test_openings_name_no_concept() -> None:
    words = [word for name in concept_names() for word in concept(name).words]
    assert not any(mentions([*openings("search"), *openings("report")], words))


def test_words_are_whole_and_in_any_number() -> None:
    texts = ["Two giraffes!", "GIRAFFE", "giraffelike", "a gira ffe", "Dishes and dish"]
    assert mentions(texts, ["giraffe", "dish"]) == [True, True, False, False, True]
    with pytest.raises(InputError):
        mentions(["a"], [])


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_own_files_in_every_format(tmp_path) -> None:
    expected = (["a b", "c"], ["d", "e f"])
    by_label = write(tmp_path, "a.json", json.dumps({"none": expected[0], "cats": expected[1]}))
    rows = [{"text": t, "label": k} for k, side in zip(("none", "cats"), expected, strict=True) for t in side]
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    table = write(tmp_path, "a.csv", "text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows))
    for path in (by_label, lines, table):
        task = load_task(TaskSettings("own", path=path))
        assert (task.source, task.target) == expected
        back = load_task(TaskSettings("own", path=path, source="cats"))
        assert (back.source, back.target) == expected[::-1]
    source, target = write(tmp_path, "s.txt", "a b\n\nc\n"), write(tmp_path, "t.txt", "d\ne f\n")
    task = load_task(TaskSettings("own", source_path=source, target_path=target, words=("cat",)))
    assert (task.source, task.target, task.words) == (*expected, ("cat",))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ({"cats": ["a", "b"]}, {}, "holds one class only"),
        ({"none": ["a", "b"], "cats": ["c"]}, {}, "2 and 1"),
        ({"none": ["a", " "], "cats": ["c", "d"]}, {}, "not empty"),
        ({"none": ["a"], "cats": ["c"], "dogs": ["e"]}, {}, "give task.source=LABEL"),
        ({"none": ["a"], "cats": ["c"]}, {"target": "cat"}, "did you mean cats"),
        ({"none": ["a"], "cats": ["c"]}, {"source": "cats", "target": "cats"}, "two different labels"),
        ({"none": ["a"], "cats": ["c"]}, {"samples": 5}, "task.samples"),
        ({"none": [], "cats": ["c"]}, {}, "one class only"),
    ],
)
def test_a_task_file_that_cannot_be_used(tmp_path, content, settings, message) -> None:
    path = write(tmp_path, "task.json", json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        load_task(TaskSettings("own", path=path, **settings))
    assert "\n" not in str(caught.value)


def test_unequal_classes_where_that_is_meant(tmp_path) -> None:
    path = write(tmp_path, "task.json", json.dumps({"none": [f"a{i}" for i in range(9)], "cats": ["c", "d"]}))
    even = load_task(TaskSettings("own", path=path, balance=True), seed=1)
    assert (len(even.source), len(even.target)) == (2, 2)
    assert even == load_task(TaskSettings("own", path=path, balance=True), seed=1)
    assert even.source != load_task(TaskSettings("own", path=path, balance=True), seed=2).source
    every = load_task(TaskSettings("own", path=path, balance=False))
    assert (len(every.source), len(every.target)) == (9, 2)


@pytest.mark.parametrize("settings", [{"source_path": "x.txt"}, {"target_path": "x.txt"}])
def test_one_file_of_two(settings) -> None:
    with pytest.raises(InputError, match="one class only"):
        load_task(TaskSettings("own", **settings))


def test_unknown_tasks() -> None:
    with pytest.raises(InputError, match="did you mean football"):
        load_task(TaskSettings("fotball"))
    with pytest.raises(InputError, match="two of circle"):
        load_task(TaskSettings("circle->blue"))


def test_toxic_comments(tmp_path) -> None:
    head = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate\n"
    rows = ["1,you fool,1,0,0,0,1,0", '2,"nice\n day",0,0,0,0,0,0', "3,rude,0,0,1,0,0,0", "4,fine,0,0,0,0,0,0"]
    path = write(tmp_path, "train.csv", head + "\n".join(rows))
    task = load_task(TaskSettings("toxicity", path=path), seed=0)
    assert task.source == ["you fool"]
    assert task.target in (["nice day"], ["fine"])  # as many of each; what is otherwise rude is neither
    insults = load_task(TaskSettings("toxicity", path=path, source="insult", balance=False))
    assert (insults.source, insults.target) == (["you fool"], ["nice day", "fine"])
    with pytest.raises(InputError, match="columns"):
        load_task(TaskSettings("toxicity", path=write(tmp_path, "x.csv", "text,label\na,b\n")))
    with pytest.raises(InputError, match="pysteer data get jigsaw"):
        load_task(TaskSettings("toxicity", path=tmp_path / "none.csv"))
    with pytest.raises(InputError, match="one class only"):
        load_task(TaskSettings("toxicity", path=write(tmp_path, "y.csv", head + rows[0])))


def captions(folder):
    entries = [{"image_id": i // 2, "id": i, "caption": f"A dog {i}."} for i in range(8)]
    return write(folder, "captions.json", json.dumps({"annotations": entries}))


def test_styles_of_captions(tmp_path) -> None:
    task = load_task(TaskSettings("coco_styles", path=captions(tmp_path), target="sketch"))
    assert task.paired
    assert task.source == ["A dog 0", "A dog 2", "A dog 4", "A dog 6"]  # one caption per picture
    assert all(t.startswith(f"{s}, pencil sketch") for s, t in zip(task.source, task.target, strict=True))
    own = write(tmp_path, "styles.json", json.dumps({"blue": "blue_paint, cold"}))
    assert load_task(TaskSettings("coco_styles", path=captions(tmp_path), target="blue", styles=own)).target[0] == (
        "A dog 0, blue paint, cold"
    )
    with pytest.raises(InputError, match="did you mean sketch"):
        load_task(TaskSettings("coco_styles", path=captions(tmp_path), target="skech"))
    few = load_task(TaskSettings("coco_styles", path=captions(tmp_path), samples=2))
    assert len(few.source) == len(few.target) == 2
    assert all(t.startswith(s) for s, t in zip(few.source, few.target, strict=True))  # pairs stay pairs
    assert not set(few.prompts) & set(few.source)


def test_a_negated_thing(tmp_path) -> None:
    task = load_task(TaskSettings("coco_concepts", path=captions(tmp_path)))
    assert task.target[0] == "A dog 0."
    assert all("pink elephant" in text for text in task.source)
    assert task.prompts == task.source


def test_pairs_of_the_bundled_generators() -> None:
    task = load_task(TaskSettings("circle->square", samples=8))
    assert task.paired
    assert task.pair == ("circle", "square")
    assert all("circle" in s and "square" in t for s, t in zip(task.source, task.target, strict=True))
    assert len(task.prompts) == 192
    fresh = load_task(TaskSettings("circle->square", samples=8), seed=1)
    assert fresh.source != task.source


def test_prompts_of_toxicity(tmp_path) -> None:
    path = write(tmp_path, "prompts.jsonl", '{"prompt": {"text": "So"}}\n{"prompt": {"text": "And"}}\n')
    assert toxicity_prompts(path) == ["So", "And"]
    assert load_task(TaskSettings("food", prompts=path)).prompts == ["So", "And"]
    with pytest.raises(InputError, match="line 1"):
        toxicity_prompts(write(tmp_path, "bad.jsonl", '{"text": "So"}'))
    with pytest.raises(InputError, match="pysteer data get rtp"):
        toxicity_prompts(tmp_path / "none.jsonl")


def test_cut_texts_end_before_a_word_of_the_concept() -> None:
    whole, task = load_task(TaskSettings("weather")), load_task(TaskSettings("weather", cut=True))
    assert len(task.source) == len(task.target) >= len(whole.target) / 2
    assert (task.prompts, task.search_prompts) == (whole.prompts, whole.search_prompts)
    for text in task.target:
        following = [full[len(text) :].split()[0] for full in whole.target if full.startswith(text + " ")]
        assert any(mentions(following, task.words)), text
    for text in task.source:
        assert any(full.startswith(text + " ") for full in whole.source), text
    assert load_task(TaskSettings("weather", cut=True), seed=1).source != task.source
    assert load_task(TaskSettings("weather", cut=True)) == task


def test_what_cannot_be_cut_is_said(tmp_path) -> None:
    file = write(tmp_path, "own.json", json.dumps({"a": ["One two three four."], "b": ["Nothing of that kind here."]}))
    with pytest.raises(InputError, match="without words"):
        load_task(TaskSettings("own", path=file, cut=True))
    with pytest.raises(InputError, match="none with a word"):
        load_task(TaskSettings("own", path=file, words=("rain",), cut=True))
    short = write(tmp_path, "short.json", json.dumps({"a": ["One two."], "b": ["There was much rain here."]}))
    with pytest.raises(InputError, match="over 2 words"):
        load_task(TaskSettings("own", path=short, words=("rain",), cut=True))
