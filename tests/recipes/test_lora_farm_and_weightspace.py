"""The two recipes end to end: a few adapters of the bundled generator are trained, read, classified and edited."""

import json

import numpy as np
import pytest
import torch

from pysteer.errors import InputError
from pysteer.recipes import execute
from pysteer.recipes.weights.config import WeightspaceConfig

CONCEPTS = "shape=square,colour=red,colour=blue"


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    out = tmp_path_factory.mktemp("farm")
    words = [f"concepts={CONCEPTS}", "adapters=6", "images=2", "steps=3", "rows=2", "ranks=1,2", "together=9",
             "check_adapters=1", "check_images=2", "precision=fp32", "lr=0.05"]  # fmt: skip
    folder, summary = execute("lora-farm", words, out=out)
    return out, words, folder, summary


def test_farm(farm):
    out, words, folder, summary = farm
    assert summary.best["adapters"] == 18
    assert (folder / "report.html").is_file()
    assert [row["label"] for row in summary.tables["effects"]] == CONCEPTS.split(",")
    records = [json.loads(path.read_text()) for path in (folder / "collection").rglob("*.json")]
    assert {record["rank"] for record in records} == {1, 2}
    ids = [each for record in records for each in record["image_ids"]]
    assert len(set(ids)) == len(ids)
    # Two adapters are lost: only they are made again, and come out the same.
    victims = sorted((folder / "collection").rglob("*.safetensors"))[3:5]
    kept = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "collection").rglob("*.safetensors")
    }
    for path in victims:
        path.unlink()
    execute("lora-farm", words, out=out)
    from safetensors.torch import load, load_file

    for path, (data, time) in kept.items():
        assert (path.stat().st_mtime_ns != time) == (path in victims)
        for name, value in load(data).items():
            torch.testing.assert_close(load_file(path)[name], value, rtol=5e-2, atol=5e-3)


def test_weightspace(farm, tmp_path):
    _, _, collection, _ = farm
    words = [f"dataset={collection / 'collection'}", "families=output,flat,stats,pca", "models=ridge",
             "best_models=linear", "components=3", "runs=2", "ablation=2", "generator=diffusion-shapes",
             "directions=colour=red->colour=blue", "strengths=0,1", "edit_adapters=2", "edit_images=1"]  # fmt: skip
    folder, summary = execute("weightspace", words, out=tmp_path)
    rows = summary.tables["families"]
    assert {row["family"] for row in rows} == {"output", "flat", "stats", "pca"}
    assert sum(row["shuffled"] for row in rows) == 1
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in rows)
    assert len(summary.tables["layers"]) == 28
    assert sum(row["without_it_and_better"] is not None for row in summary.tables["layers"]) == 2
    assert {row["direction"] for row in summary.tables["edits"]} == {"mean difference", "probe", "random, same length"}
    bridges = summary.tables["bridges"]
    assert len({row["what"] for row in bridges}) == 4
    assert -1 <= bridges[0]["mean_cosine"] <= 1
    page = (folder / "report.html").read_text()
    for part in ("Confusion", "Map of all adapters", "Which layers know", "Steering in weight space"):
        assert part in page
    assert np.isfinite([row["target"]["value"] for row in summary.tables["edits"]]).all()


def test_two_classes_and_flags(farm, tmp_path):
    _, _, collection, _ = farm
    words = [f"dataset={collection / 'collection'}", "labels=shape=square,colour=red", "flat_vec=true", "dense=true",
             "models=ridge", "best_models=ridge", "runs=1", "ablation=0"]  # fmt: skip
    _, summary = execute("weightspace", words, out=tmp_path)
    assert summary.headline["classes"] == 2
    assert [row["family"] for row in summary.tables["families"] if not row["shuffled"]] == ["flat", "delta-stats"]


def test_flags_are_families():
    assert WeightspaceConfig(flat_vec=True, pca_flat_vec=True).chosen_families == ("flat", "pca")
    assert "pca" in WeightspaceConfig().chosen_families
    with pytest.raises(InputError, match="families"):
        WeightspaceConfig(families=("magic",))
    with pytest.raises(InputError, match="labels"):
        WeightspaceConfig(labels=("one",))
