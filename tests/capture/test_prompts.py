"""Prompts files of every kind, and what is wrong with a bad one."""

from pathlib import Path

import pytest

from pysteer.capture.prompts import read_prompts
from pysteer.errors import InputError

GOOD = {
    "a.txt": "one\n\n  two \n",
    "a.json": '["one", "two"]',
    "b.json": '[{"prompt": "one"}, {"text": "two", "label": ""}]',
    "a.jsonl": '{"sentence": "one"}\n\n"two"\n',
    "a.csv": "number,prompt\n1,one\n2,two\n",
    "a.tsv": "caption\tlabel\none\t\ntwo\t\n",
}
BAD = {
    "a.txt": ("\n \n", "at least one"),
    "a.json": ("[1]", "entry 1"),
    "b.json": ('{"x": "one"}', "list"),
    "c.json": ('["one", " "]', "prompt 2"),
    "a.jsonl": ('{"prompt": "one"}\n{', "line 2"),
    "a.csv": ("number\n1\n", "columns"),
    "b.csv": ("prompt,label\none,x\n,y\n", "prompt 2"),
    "a.doc": ("one", "kind"),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GOOD[name])
    found = read_prompts(tmp_path / name)
    assert found.texts == ["one", "two"]
    assert found.labels == ["", ""]


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"red": ["one", "two"], "blue": ["three"]}')
    assert read_prompts(tmp_path / "a.json") == (["one", "two", "three"], ["red", "red", "blue"])


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00one")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(InputError, match="not found"):
        read_prompts(tmp_path / "b.txt")
