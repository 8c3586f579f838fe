"""`load_model` finds out what a name or a folder is."""

from pathlib import Path

import pytest
from tiny_language import build

from pysteer.errors import InputError
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.models.language import LanguageModel
from pysteer.models.load import load_model
from pysteer.zoo import FOLDER
from pysteer.zoo.shapes.captions import build_text_tokenizer


def test_names_and_folders(tmp_path: Path) -> None:
    assert isinstance(load_model("infinity-shapes"), InfinityPipeline)
    assert isinstance(load_model(str(FOLDER / "infinity-shapes")), InfinityPipeline)
    build("llama").save_pretrained(tmp_path)
    build_text_tokenizer().save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path)), LanguageModel)


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"holds pipeline\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_diffusers_version": "0.30.0"}')
    with pytest.raises(InputError, match="whole pipeline"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="infinity-shapes"):
        load_model("not/a/name")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="name of the hub"):
        load_model("nobody/nothing")
