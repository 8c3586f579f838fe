"""From classes of images to concept folders, and the commands `pysteer lora ...` end to end on small folders."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_adapters import tensors, write
from typer.testing import CliRunner

from pysteer.cli import app
from pysteer.errors import InputError
from pysteer.weightspace import LoraSet, read_adapter
from pysteer.weightspace.farm.concepts import folder_lesson, list_folders
from pysteer.weightspace.sources import ROOTS, Leaf, distribute, group_leaves


def _invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout  # progress goes to stderr


def _images(folder, leaf, count):
    rng = np.random.default_rng(abs(hash(leaf)) % 1000)
    (folder / leaf).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / leaf / f"{i}.png")


def test_leaves_are_grouped_along_the_links(tmp_path):
    links = [(ROOTS["dog"], "n1"), ("n1", "n2"), (ROOTS["bird"], "n3"), ("n9", "n3"), ("n2", "n1"), ("x", "n4")]
    (tmp_path / "is_a.txt").write_text("\n".join(f"{parent} {child}" for parent, child in links))
    (tmp_path / "names.txt").write_text("n2 beagle, dog of some kind\nn3 wren\nn4 table\n")
    said = _invoke("lora", "leaves", tmp_path / "is_a.txt", tmp_path / "names.txt", tmp_path / "leaves.json")
    found = json.loads((tmp_path / "leaves.json").read_text())
    assert found == [{"leaf": "n3", "root": "bird", "name": "wren"}, {"leaf": "n2", "root": "dog", "name": "beagle"}]
    assert said.split() == ["1", "bird", "1", "dog"]
    with pytest.raises(InputError, match="leaves"):
        group_leaves({"n4": "table"}, {"n4": ["x"]})


def test_concept_folders(tmp_path):
    for leaf, count in (("a1", 9), ("a2", 7), ("b1", 12)):
        _images(tmp_path / "images", leaf, count)
    leaves = [Leaf("a1", "a"), Leaf("a2", "a"), Leaf("b1", "b")]
    given = {"folders": 3, "least": 2, "most": 4, "side": 8, "seed": 1}
    made = distribute(tmp_path / "images", tmp_path / "out", leaves, **given)
    assert made == {"a": 3, "b": 3}
    seen = []
    for folder in list_folders(tmp_path / "out"):
        record = json.loads((folder / "metadata.json").read_text())
        table = pq.read_table(folder / "images.parquet")
        assert len(table) == record["num_images"] in (2, 3, 4)
        assert record["category_name"] == folder.parent.name == record["leaf_id"][0]
        seen += record["image_ids"]
        lesson = folder_lesson(folder, tmp_path / "out", 0, 8, (1,), 0)
        assert lesson.label == record["category_name"]
        assert lesson.images.shape == (record["num_images"], 8, 8, 3)
    assert len(seen) == len(set(seen))  # no image twice, unless it is asked for
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    distribute(tmp_path / "images", tmp_path / "out", leaves, **given)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    few = distribute(tmp_path / "images", tmp_path / "few", leaves, folders=50, least=2, most=4, side=8)
    many = distribute(tmp_path / "images", tmp_path / "many", leaves, folders=50, least=2, most=4, side=8, reuse=True)
    assert max(few.values()) < 10
    assert many == {"a": 50, "b": 50}


def test_two_classes_without_a_hierarchy(tmp_path):
    for label in ("neutral", "other"):
        _images(tmp_path / "images", label, 10)
    words = ["--folders", 2, "--least", 5, "--most", 5, "--side", 8]
    said = _invoke("lora", "distribute", tmp_path / "images", tmp_path / "out", *words)
    assert said.split() == ["2", "neutral", "2", "other"]
    assert all(json.loads(path.read_text())["num_images"] == 5 for path in (tmp_path / "out").rglob("metadata.json"))


def test_read_says_what_was_left_out(folder):
    (folder / "class-0" / "bad.safetensors").write_bytes(b"no")
    found = json.loads(_invoke("lora", "read", folder, "--json"))
    assert found["adapters"] == 12
    assert found["classes"] == {"class-0": 6, "class-1": 6}
    assert [skip["file"] for skip in found["skipped"]] == ["class-0/bad.safetensors"]
    assert "left out class-0/bad.safetensors" in _invoke("lora", "read", folder)


def test_new_adapters(folder, tmp_path):
    _invoke("lora", "edit", folder, "00", tmp_path / "e.safetensors", "--to", "class-1", "--from", "class-0", "-t", 0.5)
    _invoke("lora", "interpolate", folder, "00", "01", tmp_path / "i.safetensors", "-t", 1.0, "--format", "kohya")
    _invoke("lora", "sample", folder, "class-1", tmp_path / "s", "--count", 2)
    second = LoraSet.open(folder)
    wanted = second.adapter(second.names.index("class-1/01.safetensors"))
    for name, it in read_adapter(tmp_path / "i.safetensors").layers.items():
        torch.testing.assert_close(it.delta(), wanted.layers[name].delta(), rtol=1e-4, atol=1e-5)
    edited, plain = read_adapter(tmp_path / "e.safetensors"), read_adapter(folder / "class-0" / "00.safetensors")
    assert all(not torch.allclose(edited.layers[k].delta(), plain.layers[k].delta(), atol=1e-2) for k in plain.layers)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 2


def test_nearest_pack_and_data_set(folder, tmp_path):
    given = {name: value * 1.01 for name, value in tensors(4).items()}
    from safetensors.torch import save_file

    save_file(given, folder / "class-1" / "twin.safetensors")
    first = _invoke("lora", "nearest", folder, "04").splitlines()[0]
    assert first.split() == ["1.0000", "class-1", "class-1/twin.safetensors"]
    _invoke("lora", "pack", folder, tmp_path / "packed")
    _invoke("lora", "dataset", tmp_path / "packed", tmp_path / "data")
    assert json.loads(_invoke("lora", "read", tmp_path / "data", "--json"))["adapters"] == 13


def test_upload_goes_to_the_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, **more):
            calls.append(("create", name, more["repo_type"], more["private"]))

        def upload_folder(self, folder_path, repo_id, repo_type):
            files = sorted(path.name for path in folder_path.rglob("*") if path.is_file())
            calls.append(("upload", repo_id, repo_type, files))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    _invoke("lora", "dataset", folder, tmp_path / "data", "--push", "me/loras", "--private")
    assert calls == [
        ("create", "me/loras", "dataset", True),
        ("upload", "me/loras", "dataset", ["README.md", "train-00000-of-00001.parquet"]),
    ]


def test_mistakes_are_named(folder, tmp_path):
    out = tmp_path / "x.safetensors"
    for words in (
        ["edit", folder, "nobody", out, "--to", "class-1"],
        ["edit", folder, "00", out, "--to", "no such class"],
        ["edit", folder, "00", out, "--to", "class-1", "--kind", "magic"],
    ):
        result = CliRunner().invoke(app, ["lora", *map(str, words)])
        assert isinstance(result.exception, InputError)
    assert not out.exists()
    write(folder / "a.safetensors", 90)
    assert "(no class)" in _invoke("lora", "read", folder)
