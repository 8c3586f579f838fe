"""The bundled diffusion pipeline: its folder, what it draws, and that seeds alone decide it."""

import pytest
import torch

from pysteer import zoo
from pysteer.zoo.shapes.captions import MAX_TOKENS, captions_of, sample_scenes, vocabulary
from pysteer.zoo.shapes.evaluate import generate_images, judge

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

FOLDER = zoo.FOLDER / "diffusion-shapes"
SCENES = sample_scenes(16, 401)
SEED = 401
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 20}


@pytest.fixture(scope="module")
def generator():
    return zoo.load("diffusion-shapes")


@pytest.fixture(scope="module")
def images(generator):
    return generate_images(generator, captions_of(SCENES), SEED, batch=16, **SETTINGS)


def test_the_folder_is_a_stable_diffusion_pipeline():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    assert pipe.safety_checker is None
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert isinstance(pipe.vae, diffusers.AutoencoderKL)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    attention = [name for name in pipe.unet.attn_processors if ".attn2." in name]
    assert len(attention) == 7


def test_its_tokenizer_pads_to_the_length_of_the_text_encoder():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    length = pipe.tokenizer.model_max_length
    assert length == MAX_TOKENS == pipe.text_encoder.config.max_position_embeddings
    ids = pipe.tokenizer(["a red star", ""], padding="max_length", max_length=length).input_ids
    words = vocabulary()
    assert ids[0] == [words[w] for w in ("a", "red", "star", "</s>")] + [0] * (length - 4)
    assert ids[1] == [words["</s>"]] + [0] * (length - 1)


def test_it_is_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) <= 14e6
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20e6


def test_most_captions_are_drawn_right(images):
    assert images.shape == (16, 64, 64, 3)
    assert images.dtype == torch.uint8
    verdict = zoo.load_classifier("shapes").classify(images)
    right, stated = judge(SCENES, images, verdict)
    assert int(right["shape"].sum()) >= 13
    assert int(right["colour"].sum()) >= 14
    assert float(right["background"][stated["background"]].float().mean()) >= 0.9


def test_images_follow_from_prompt_and_seed_whatever_the_batch(generator, images):
    again = generate_images(generator, captions_of(SCENES[:4]), SEED, batch=1, **SETTINGS)
    difference = (again.int() - images[:4].int()).abs()
    assert int(difference.max()) <= 2
    other = generate_images(generator, captions_of(SCENES[:1]), SEED + 1, batch=1, **SETTINGS)
    assert int((other.int() - images[:1].int()).abs().max()) > 20
