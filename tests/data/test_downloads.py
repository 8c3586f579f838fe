"""Downloads from a file address: checksums, archives, and what goes wrong; and sentences from a writer."""

import hashlib
import io
import tarfile
import zipfile

import pytest
from typer.testing import CliRunner

from pysteer.cli import app
from pysteer.data.downloads import DATASETS, Dataset, find_dataset, get, here
from pysteer.data.sentences import first_sentence, write_sentences
from pysteer.errors import InputError


def archive(folder, kind):
    path = folder / f"data.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("inside/a.txt", "content")
            out.writestr("../evil.txt", "no")
    else:
        with tarfile.open(path, "w:gz") as out:
            entry = tarfile.TarInfo("inside/a.txt")
            entry.size = 7
            out.addfile(entry, io.BytesIO(b"content"))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_members_of_an_archive(tmp_path, kind) -> None:
    path = archive(tmp_path, kind)
    sha = hashlib.sha1(path.read_bytes()).hexdigest()
    data = Dataset("set", path.as_uri(), "", "sha1", sha, {"inside/a.txt": "sub/b.txt"})
    seen = []
    folder = get(data, tmp_path / "all", progress=lambda done, total: seen.append((done, total)))
    assert (folder / "sub" / "b.txt").read_text() == "content"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["b.txt", "checksums.json"]
    assert seen[-1][0] == path.stat().st_size
    assert here(data, tmp_path / "all")
    path.unlink()
    assert get(data, tmp_path / "all") == folder  # it is there, nothing is fetched


def test_a_wrong_checksum_leaves_nothing(tmp_path) -> None:
    path = archive(tmp_path, "zip")
    data = Dataset("set", path.as_uri(), "", "sha1", "0" * 40, {"inside/a.txt": "b.txt"})
    with pytest.raises(InputError, match="checksum of set"):
        get(data, tmp_path / "all")
    assert not list((tmp_path / "all" / "set").iterdir())


def test_the_first_checksum_is_kept(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    data = Dataset("set", path.as_uri(), "")
    target = get(data, tmp_path / "all")
    assert (target / "a.txt").read_text() == "one"
    (target / "a.txt").unlink()
    path.write_text("two")
    with pytest.raises(InputError, match="checksum"):
        get(data, tmp_path / "all")


def test_what_cannot_be_fetched(tmp_path) -> None:
    with pytest.raises(InputError, match="download"):
        get(Dataset("set", (tmp_path / "none.zip").as_uri(), ""), tmp_path)
    path = archive(tmp_path, "zip")
    with pytest.raises(InputError, match="lacks a file"):
        get(Dataset("set", path.as_uri(), "", members={"inside/c.txt": "c.txt"}), tmp_path / "all")
    with pytest.raises(InputError, match=r"train\.csv"):
        get(find_dataset("jigsaw"), tmp_path)
    with pytest.raises(InputError, match="did you mean coco"):
        find_dataset("cocoo")


def test_data_sets_with_an_address_are_complete() -> None:
    for each in DATASETS.values():
        assert each.url.startswith("http") or each.needs
        assert bool(each.checksum) == bool(each.algorithm)


def test_the_command(tmp_path) -> None:
    listed = CliRunner().invoke(app, ["data", "list", "--folder", str(tmp_path)])
    assert listed.exit_code == 0
    assert "coco  not here" in listed.output
    assert "giraffe" in listed.output


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ('"The cat sat on the old mat." And more.', "The cat sat on the old mat."),
        ("Sure! Here is one", ""),
        ("The cat: it sat there on the mat.", ""),
        ("Too short here.", ""),
        ("It rained all day long\nand all night.", ""),
    ],
)
def test_first_sentences(answer, sentence) -> None:
    assert first_sentence(answer) == sentence


def test_sentences_are_collected_over_rounds() -> None:
    asked = []

    def generate(questions, seed):
        asked.append((len(questions), seed))
        return [f"The number {seed} {i % 3} is quite large." for i in range(len(questions))]

    found = write_sentences(generate, ["a number"], 5, batch=5, seed=4, accept=lambda text: " 1 is" not in text)
    assert len(found) == len(set(found)) == 5
    assert [seed for _, seed in asked] == [4, 5, 6]
    with pytest.raises(InputError, match="sentences"):
        write_sentences(lambda questions, seed: [""] * len(questions), ["a"], 3, rounds=2)
