"""Collections: what is read, what is left out and why, resuming, packing, data sets."""

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_adapters import LAYERS, tensors, write

from pysteer.errors import InputError
from pysteer.weightspace import LoraSet, export_dataset, import_dataset, read_adapter


def test_rows_are_the_files(folder):
    adapters = LoraSet.open(folder)
    assert len(adapters) == 12
    assert adapters.layout.width == sum(2 * (i + o) for i, o in LAYERS.values())
    assert sorted(set(adapters.labels)) == ["class-0", "class-1"]
    for index, name in enumerate(adapters.names):
        for layer, it in read_adapter(folder / name).layers.items():
            assert torch.equal(adapters.adapter(index).layers[layer].delta(), it.delta())
            up, down, scale = adapters.factors(layer)
            assert torch.equal(up[index] @ down[index] * scale[index], it.delta())


def test_mixed_ranks_alphas_and_formats_share_a_layout(folder):
    write(folder / "class-0" / "wide.safetensors", 100, rank=4)
    read_adapter(write(folder / "x.safetensors", 101, rank=1)).save(folder / "class-1" / "kohya.safetensors", "kohya")
    os.remove(folder / "x.safetensors")
    given = tensors(102)
    given["unet.mid_block.attentions.0.to_q.alpha"] = torch.tensor(1.0)
    save_file(given, folder / "class-1" / "alpha.safetensors")
    adapters = LoraSet.open(folder)
    assert len(adapters) == 15
    assert {int(rank) for rank in adapters.ranks.flatten()} == {1, 2, 4}
    for index, name in enumerate(adapters.names):
        for layer, it in read_adapter(folder / name).layers.items():
            torch.testing.assert_close(adapters.adapter(index).layers[layer].delta(), it.delta())
    assert 0.5 in adapters.scales


def _bad(folder):
    """Files that cannot be used, by what their reason says."""
    some = folder / "class-0"
    good = (some / "00.safetensors").read_bytes()
    (some / "cut.safetensors").write_bytes(good[:-10])
    (some / "empty.safetensors").write_bytes(b"")
    (some / "head.safetensors").write_bytes(b"\xff" * 200)
    (some / "copy.safetensors").write_bytes(good)
    broken = tensors(50)
    broken[next(iter(broken))][0, 0] = float("nan")
    save_file(broken, some / "nan.safetensors")
    trick = {f"unet/../../{name}": value for name, value in tensors(51).items()}
    save_file(trick, some / "trick.safetensors")
    half = dict(list(tensors(52).items())[:1])
    save_file(half, some / "half.safetensors")
    other = {name.replace("mid_block", "other"): value for name, value in tensors(53).items()}
    save_file(other, some / "other.safetensors")
    save_file({"lora_unet_mid.hada_w1_a": torch.ones(2, 2)}, some / "loha.safetensors")
    write(some / "record.safetensors", 54).with_suffix(".json").write_text("[1, 2")
    return {"cut": "truncated", "empty": "truncated", "head": "truncated", "copy": "duplicate", "nan": "NaN",
            "trick": "tensor name", "half": "factors of", "other": "layers:", "loha": "kind of adapter",
            "record": "not JSON"}  # fmt: skip


def test_what_cannot_be_used_is_reported_and_the_rest_goes_on(folder):
    wanted = _bad(folder)
    os.symlink("/etc/hostname", folder / "class-0" / "link.safetensors")
    adapters = LoraSet.open(folder)
    reasons = {skip.path.rpartition("/")[2].removesuffix(".safetensors"): skip.reason for skip in adapters.skipped}
    assert len(adapters) == 12
    assert set(reasons) == set(wanted)
    for name, said in wanted.items():
        assert said in reasons[name], (name, reasons[name])


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"a\.safetensors"):
        LoraSet.open(tmp_path)
    with pytest.raises(InputError, match="folder of adapters"):
        LoraSet.open(tmp_path / "none")


def test_damaged_files_never_stop_the_reading(folder):
    """Two hundred random damages of one file: it is read or left out, and the others are there."""
    good = (folder / "class-0" / "00.safetensors").read_bytes()
    rng = random.Random(0)
    for trial in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data) if trial % 2 else 300)] = rng.randrange(256)
        cut = rng.randrange(len(data)) if trial % 5 == 0 else len(data)
        (folder / f"damaged-{trial}.safetensors").write_bytes(bytes(data[:cut]))
    adapters = LoraSet.open(folder)
    assert {f"class-{i % 2}/{i:02d}.safetensors" for i in range(12)} <= set(adapters.names)
    assert len(adapters.skipped) > 50
    assert len(adapters) + len(adapters.skipped) == 212
    assert np.isfinite(adapters.rows).all()


def test_opening_again_reads_what_is_new_alone(folder, monkeypatch):
    from pysteer.weightspace import store

    LoraSet.open(folder)
    read = []
    real = store.read_plain
    monkeypatch.setattr(store, "read_plain", lambda path, *more: (read.append(path.name), real(path, *more))[1])
    assert len(LoraSet.open(folder)) == 12
    assert read == []
    write(folder / "class-1" / "zz.safetensors", 77)
    adapters = LoraSet.open(folder)
    assert read == ["zz.safetensors"]
    assert len(adapters) == 13
    # A changed file is read again, and with it all rows, because they lie one after the other.
    write(folder / "class-0" / "00.safetensors", 999)
    os.utime(folder / "class-0" / "00.safetensors", ns=(1, 1))
    again = LoraSet.open(folder)
    layer, name = next(iter(LAYERS)), "class-0/00.safetensors"
    found = again.adapter(again.names.index(name)).layers[layer]
    assert torch.equal(found.delta(), read_adapter(folder / name).layers[layer].delta())


def test_interrupted_reading_goes_on(folder, monkeypatch):
    from pysteer.weightspace import store

    monkeypatch.setattr(store, "_BLOCK", 4)
    monkeypatch.setattr(store, "_SAVE", 4)
    seen = []

    def stop(done, total):
        seen.append(done)
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LoraSet.open(folder, progress=stop)
    starts = []
    adapters = LoraSet.open(folder, progress=lambda done, total: starts.append(done))
    assert starts[0] == 8
    assert len(adapters) == 12
    whole = LoraSet.open(folder, cache=folder.parent / "other")
    assert np.array_equal(adapters.rows, whole.rows)


def test_packed_set_is_the_same(folder, tmp_path):
    adapters = LoraSet.open(folder)
    packed = LoraSet.open(adapters.save(tmp_path / "packed"))
    assert np.array_equal(packed.rows, adapters.rows)
    assert packed.entries == adapters.entries
    with (tmp_path / "packed" / "rows.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(InputError, match="rows of the collection"):
        LoraSet.open(tmp_path / "packed")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_data_set_of_nested_lists(folder, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    adapters = LoraSet.open(folder)
    place = export_dataset(adapters, tmp_path / "data", shard_rows=5)
    if kind == "arrow":
        table = pq.read_table(place / "data")
        place = tmp_path / "arrow"
        place.mkdir()
        with (
            pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=5)
    found = import_dataset(place, tmp_path / "rows")
    assert found.labels == adapters.labels
    assert found.layout.layers == adapters.layout.layers
    assert np.array_equal(found.rows, adapters.rows)


def test_groups_join_adapters_that_share_an_image(tmp_path):
    for index, images in enumerate([("a", "b"), ("c",), ("b", "d"), ("d",), ("e",)]):
        write(tmp_path / f"{index}.safetensors", index, label="x", images=images)
    groups = LoraSet.open(tmp_path).groups
    assert groups[0] == groups[2] == groups[3]
    assert len({groups[0], groups[1], groups[4]}) == 3


def test_record_without_a_class(tmp_path):
    write(tmp_path / "a.safetensors", 0)
    write(tmp_path / "b.safetensors", 1).with_suffix(".json").write_text(json.dumps({"category_name": "dog"}))
    assert LoraSet.open(tmp_path).labels == ["", "dog"]
