import pickle

import pytest
import torch

from pysteer import zoo
from pysteer.errors import InputError
from pysteer.files import write_safetensors
from pysteer.recipes.prototype.baseline import BaselineFile
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.data import Pair, PairData, Prompts
from pysteer.recipes.prototype.judge import find_judge
from pysteer.zoo.shapes.classifier import ShapeClassifier

SHAPES = Pair("shape", "circle", "square")
ANIMALS = Pair("class", "dog", "cat")
IMAGES = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def config(tmp_path, name):
    return PrototypeConfig(experiment_dir=str(tmp_path), classifier_weights=name)


@pytest.mark.parametrize("name", ["judge.safetensors", "judge.pth", "folder"])
def test_own_classifier_weights_are_used(tmp_path, name):
    torch.manual_seed(7)
    model = ShapeClassifier().eval()
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / name
    if name == "folder":
        model.save_pretrained(path)
    elif name.endswith(".pth"):
        torch.save(model.state_dict(), path)
    else:
        write_safetensors(path, model.state_dict())
    judge = find_judge(config(tmp_path, name), SHAPES)
    want = model.classify(IMAGES)
    got = judge(IMAGES)
    assert got.labels == want.labels
    assert torch.equal(got.features, want.features)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_unusable_classifier_weights_are_named(tmp_path, capsys):
    folder = tmp_path / "weights"
    folder.mkdir()
    with pytest.raises(InputError, match=r"CLASSIFIER_WEIGHTS not found.*nothing\.pth"):
        find_judge(config(tmp_path, "nothing.pth"), SHAPES)
    torch.save({"layer": torch.zeros(2)}, folder / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth"):
        find_judge(config(tmp_path, "other.pth"), SHAPES)
    (folder / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InputError, match="cannot be read"):
        find_judge(config(tmp_path, "evil.pth"), SHAPES)
    assert "ran" not in capsys.readouterr().out


def animals(tmp_path, labels):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, id2label=dict(enumerate(labels))))
    model.save_pretrained(tmp_path / "weights" / "vit")
    return config(tmp_path, "vit")


def test_a_transformers_classifier_judges_other_datasets(tmp_path):
    judge = find_judge(animals(tmp_path, ["tabby, cat", "German shepherd, dog", "bucket"]), ANIMALS)
    got = judge(IMAGES)
    assert set(got.labels["class"]) <= {"cat", "dog", "none"}
    assert got.features.shape == (5, 3)
    words = ["cat", "dog", "none"]
    assert got.labels["class"] == [words[i] for i in got.features.argmax(1).tolist()]
    # Bright and dark images are told apart by a random network too.
    assert not torch.allclose(judge(IMAGES // 8).features, got.features)


def test_a_classifier_that_lacks_a_class_is_refused(tmp_path):
    with pytest.raises(InputError, match="with the word cat"):
        find_judge(animals(tmp_path, ["catapult", "dog"]), ANIMALS)


def test_without_classifier_other_datasets_are_not_judged():
    assert find_judge(PrototypeConfig(dataset="dogs_cats", dataset_path="x"), ANIMALS) is None


def test_the_bundled_classifier_is_the_default(monkeypatch):
    model = ShapeClassifier().eval()
    monkeypatch.setattr(zoo, "load_classifier", lambda name: model)
    assert find_judge(PrototypeConfig(), SHAPES).classifier is model


def data(seeds=(1, 2, 3)):
    prompts = Prompts(["a circle"] * 3, ["a square"] * 3, list(seeds))
    return PairData(SHAPES, prompts, prompts, [], {}, Prompts([], [], []))


def test_saved_baseline_of_a_pth_file_and_of_other_settings(tmp_path):
    images = IMAGES[:3].clone()
    (tmp_path / "weights").mkdir()
    torch.save(images, tmp_path / "weights" / "unchanged.pth")
    named = BaselineFile(str(tmp_path), "unchanged.pth", False, {"cfg": 2})
    assert torch.equal(named.load(data()), images)
    torch.save(IMAGES, tmp_path / "weights" / "unchanged.pth")
    with pytest.raises(InputError, match=r"uint8 \[3, H, W, 3\]"):
        named.load(data())

    auto = BaselineFile(str(tmp_path), "", False, {"cfg": 2})
    assert auto.load(data()) is None
    assert auto.save(data(), images).suffix == ".safetensors"
    assert torch.equal(auto.load(data()), images)
    assert BaselineFile(str(tmp_path), "", False, {"cfg": 3}).load(data()) is None
    with pytest.raises(InputError, match="made from other settings"):
        BaselineFile(str(tmp_path), "unchanged.safetensors", False, {"cfg": 3}).load(data())
    with pytest.raises(InputError, match="made from other seeds"):
        BaselineFile(str(tmp_path), "unchanged.safetensors", False, {"cfg": 2}).load(data((1, 2, 4)))


def test_several_pairs_have_files_of_their_own(tmp_path):
    several = BaselineFile(str(tmp_path), "base.safetensors", True, {})
    assert several.of(data()).name == "base-circle-to-square.safetensors"
