"""The recipe act-image on a tiny generator, names of sites as published, and CLIP scores."""

import io
import json

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from pixel_judge import PixelJudge
from rich.console import Console
from tiny_diffusion import clip_tokenizer
from tiny_infinity import tiny_pipeline

from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.metrics.clip_score import Clip
from pysteer.recipes import act_image as module
from pysteer.recipes.frame import execute
from pysteer.recipes.transport import image_trial
from pysteer.recipes.transport.images import folder_name
from pysteer.recipes.transport.places import expand_sites

SMALL = ("task.samples=4", "generation.num_prompts=3", "generation.rows=6", "strengths.values=0,4,16")


@pytest.fixture
def tiny(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(module, "load_model", lambda name: pipe)
    monkeypatch.setattr(image_trial, "ShapesJudge", PixelJudge)
    return pipe


def start(out, *words, name="run"):
    text = io.StringIO()
    console = Console(file=text, width=200)
    folder, summary = execute("act-image", [*SMALL, *words], out=out, run_name=name, console=console)
    return folder, summary, text.getvalue()


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).tolist()


def test_images_over_strengths_and_guidance(tiny, tmp_path) -> None:
    words = ("model.sites=ca_block", "method.names=mean_difference", "generation.guidance=2,4")
    folder, summary, _ = start(tmp_path, *words)
    base = folder / "images" / "mean_difference"
    names = sorted(each.name for each in base.iterdir())
    assert names == sorted([*(folder_name(s, g) for s in (0, 4, 16) for g in (2, 4)), "animations"])
    for guidance in (2, 4):
        shown = [[pixels(base / folder_name(s, guidance) / f"{index}.png") for index in range(3)] for s in (0, 4, 16)]
        assert shown[0] != shown[1] != shown[2]
    asked = json.loads((folder / "prompts.json").read_text())
    plain = tiny([row["prompt"] for row in asked], seeds=[row["seed"] for row in asked], cfg=2.0).images
    for index, image in enumerate(plain):  # strength 0 is the unsteered generator, whatever shares its batch
        own = torch.tensor(pixels(base / folder_name(0, 2) / f"{index}.png"))
        assert (own - image.int()).abs().max() <= 1
    with Image.open(next((base / "animations").glob("*.webp"))) as moving:
        assert moving.n_frames == 4  # there and back: 0, 4, 16, 4
    assert len(summary.tables["methods"]) == 6
    unsteered = [row for row in summary.tables["methods"] if row["strength"] == 0]
    assert all(row["pixel_change"] == 0 and row["kept_rate"]["value"] == 1 for row in unsteered)
    assert "<script" not in (folder / "report.html").read_text()


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch) -> None:
    words = ("model.sites=ca", "method.names=mean_difference,linear_act", "generation.animation=none")
    made = image_trial.ImageWriter._made
    counts = [0]

    def counted(self, *args):
        counts[0] += 1
        if counts[0] == 3:
            raise KeyboardInterrupt
        return made(self, *args)

    monkeypatch.setattr(image_trial.ImageWriter, "_made", counted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, *words)
    folder, _, log = start(tmp_path, *words)
    assert counts[0] == 1 + 4  # two batches of prompts for each of two methods, and the one that was interrupted
    assert "fit-mean_difference: finished before" in log
    assert len(list((folder / "images").rglob("*.png"))) == 2 * 3 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generation.num_prompts=500"], "num_prompts"),
        (["model.sites=nothing.7"], "sites"),
        (["task.words=red"], "task.words"),
        (["task.name=red->bleu"], "task"),
        (["method.names=protoype"], "did you mean prototype"),
        (["generation.inference_steps=4"], "inference_steps"),
        (["method.response_steps=1"], "response_steps"),
        (["generation.animation=mp4"], "webp, gif, none"),
        (["model.dtype=float16"], "float32 for this model"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(tiny, tmp_path, words, message) -> None:
    with pytest.raises(InputError) as caught:
        start(tmp_path, *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_outputs_of_the_blocks_of_flux() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    known = find_family(flux).sites(flux)
    both = expand_sites(known, [r"transformer.transformer_blocks.[0-9]+:[0-1]"])
    assert sorted({(known[name].path, known[name].element) for name in both}) == [
        (f"transformer_blocks.{i}", k) for i in (0, 1) for k in (0, 1)
    ]
    one, other = (expand_sites(known, [f"transformer.transformer_blocks.0:{k}"]) for k in (0, 1))
    assert [known[name].element for name in (*one, *other)] == [0, 1]
    assert expand_sites(known, [r"transformer.transformer_blocks.0:0", r"transformer.transformer_blocks.0:1"]) == [
        name for name in known if name in (*one, *other)
    ]


def test_clip_scores_follow_the_images(tmp_path) -> None:
    torch.manual_seed(0)
    config = tf.CLIPConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 16, "eos_token_id": 1,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8,
        },
        projection_dim=16,
    )  # fmt: skip
    tf.CLIPModel(config).save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    clip = Clip(tmp_path, batch_size=2)
    before = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8)
    after = before.flip(0).contiguous()
    scores = clip.scores(before, after, "a red circle", "a blue square")
    image, text = clip.images(after), clip.texts(["a red circle", "a blue square"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scores.source, image @ text[0])
    moved, wanted = image - clip.images(before), text[1] - text[0]
    expected = torch.cosine_similarity(moved, wanted[None])
    torch.testing.assert_close(scores.directional[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    assert scores.directional[1].isnan()  # the middle image did not move
    same = clip.scores(before, before, "a red circle", "a blue square")
    assert same.directional.isnan().all()
    with pytest.raises(InputError, match="CLIP model"):
        Clip(tmp_path / "none")
