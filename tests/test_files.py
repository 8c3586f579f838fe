"""Writers leave the old file or the new one, nothing else; readers refuse what is damaged in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pysteer import files
from pysteer.errors import InputError

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
WRITERS = {
    "bytes": (files.write_bytes, b"new"),
    "text": (files.write_text, "new"),
    "json": (files.write_json, {"new": 1}),
    "png": (files.write_image, IMAGE),
    "parquet": (files.write_parquet, [{"new": 1}]),
    "safetensors": (files.write_safetensors, {"new": torch.ones(3)}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_writes_into_new_folders_and_leaves_no_temporary(kind: str, tmp_path: Path) -> None:
    write, value = WRITERS[kind]
    target = tmp_path / "a" / "b" / f"file.{kind}"
    assert write(target, value) == target
    assert target.stat().st_size > 0
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_failure_keeps_the_old_file(kind: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, value = WRITERS[kind]
    target = tmp_path / f"file.{kind}"
    target.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="no space left"):
        write(target, value)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_failure_while_filling_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table.txt"
    target.write_text("old")

    def interrupted() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = files.write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_contents_come_back(tmp_path: Path) -> None:
    value = {
        "tensor": torch.tensor([1.5, 2]),
        "array": np.int32(3),
        "path": tmp_path,
        "bad": float("nan"),
        "set": {2, 1},
    }
    files.write_json(tmp_path / "a.json", value)
    expected = {"tensor": [1.5, 2.0], "array": 3, "path": str(tmp_path), "bad": None, "set": [1, 2]}
    assert files.read_json(tmp_path / "a.json") == expected
    files.write_image(tmp_path / "a.png", torch.from_numpy(IMAGE))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), IMAGE)
    files.write_parquet(tmp_path / "a.parquet", {"x": [1, 2]})
    assert pq.read_table(tmp_path / "a.parquet").to_pydict() == {"x": [1, 2]}
    tensors = {"w": torch.randn(3, 4).T, "i": torch.arange(3)}
    files.write_safetensors(tmp_path / "a.safetensors", tensors, {"kind": "test"})
    back, metadata = files.read_safetensors(tmp_path / "a.safetensors", shapes={"w": (4, 3), "i": (3,)})
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert metadata == {"kind": "test"}


def test_json_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "a.json", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{1}", ["prompts file", "not JSON", "line 1"]),
        (b"\xff\xfe\xfa", ["prompts file", "UTF-8"]),
        (None, ["not found"]),
    ],
)
def test_bad_json_is_one_line(content: bytes | None, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_json(path, "prompts file")
    assert all(word in str(caught.value) for word in [*words, "prompts.json"])
    assert "\n" not in str(caught.value)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    path = files.write_safetensors(
        tmp_path / "w.safetensors", {"w": torch.ones(8), "n": torch.tensor([1.0, float("nan")])}
    )
    with pytest.raises(InputError, match=r"tensor n.*NaN"):
        files.read_safetensors(path)
    assert set(files.read_safetensors(path, finite=False)[0]) == {"w", "n"}
    for shapes, words in [
        ({"w": (8,)}, "unexpected tensors"),
        ({"w": (8,), "n": (2,), "more": (1,)}, "lacks 1 tensors"),
        ({"w": (2, 4), "n": (2,)}, r"shape of w.*\[8\].*\[2, 4\]"),
    ]:
        with pytest.raises(InputError, match=words):
            files.read_safetensors(path, shapes=shapes, finite=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_weights_never_crash(data: st.DataObject, tmp_path: Path) -> None:
    path = files.write_safetensors(tmp_path / "w.safetensors", {"w": torch.ones(4, 4), "b": torch.zeros(4)})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    message, tensors = "", {}
    try:
        tensors, _ = files.read_safetensors(path, shapes={"w": (4, 4), "b": (4,)})
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == (0 if tensors else 1)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_json_file_is_valid_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {"x": [None, 1.0]}


def test_a_slice_of_positions_is_a_list_of_its_ends() -> None:
    assert files.plain({"positions": slice(1, None)}) == {"positions": [1, None, None]}
    assert files.plain(slice(1, None)) != files.plain(slice(2, None))


@pytest.mark.parametrize("metadata", [None, {}, {"kind": "batch"}])
def test_a_file_without_tensors_is_read_back(tmp_path, metadata):
    path = files.write_safetensors(tmp_path / "none.safetensors", {}, metadata)
    assert files.read_safetensors(path) == ({}, metadata or {})
