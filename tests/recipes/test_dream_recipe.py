"""The recipe dream on a tiny pipeline: all stages, one at a time, interrupted, shared by processes, linked by name."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_diffusion import stable_diffusion

from pysteer.cli import run_command
from pysteer.dream.deep_dream import Dreamer
from pysteer.dream.parts import Parts, Share
from pysteer.dream.representation import Representation
from pysteer.errors import InputError, PysteerError
from pysteer.models.diffusion import ImageGenerator
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes.config import build_config, read_values
from pysteer.recipes.dreaming import studio, workers
from pysteer.recipes.dreaming.config import DreamRecipeConfig, DreamSettings
from pysteer.recipes.frame import execute
from pysteer.zoo import available

pytest.importorskip("diffusers")

WORDS = (
    "settings={num_inference_steps: 4}", "capture.batch_size=2", "capture.top_k=8", "timestep_analysis.top_k=4",
    "features=3", "prior.n_results=2", "prior.features_per_batch=2", "deep_dream.num_steps=3",
    "deep_dream.snapshot_every=2", "deep_dream.rows_per_batch=6", "deep_dream.timesteps=[0, 500]",
)  # fmt: skip
PROMPTS = ["a red circle", "a blue square", "two circle", "a ugly red", "the blue"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(20, 32), dim=1)
    sae = SparseAutoencoder(
        decoder.clone(), torch.zeros(20), decoder, torch.zeros(32), "topk", 3, meta={"site": "up.1.0"}
    )
    sae.save_pretrained(tmp_path / "sae")
    labels = ["red", "blue", "two", "red", "blue"]
    entries = [{"prompt": text, "label": label} for text, label in zip(PROMPTS, labels, strict=True)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    pipe = ImageGenerator(stable_diffusion())
    monkeypatch.setattr(studio, "load_model", lambda name: pipe)
    return tmp_path


def start(tmp_path, *words, name="run"):
    given = [
        f"sae={tmp_path / 'sae'}",
        f"prompts={tmp_path / 'prompts.json'}",
        "capture.dev_n_prompts=0",
        *WORDS,
        *words,
    ]
    out = io.StringIO()
    folder, summary = execute(
        "dream", given, out=tmp_path / "results", run_name=name, console=Console(file=out, width=200)
    )
    return folder, summary, out.getvalue()


def test_all_stages_leave_a_representation_that_can_be_moved(tiny):
    folder, summary, _ = start(tiny, "capture.maps=true")
    moved = tiny / "elsewhere"
    (folder / "representation").rename(moved)
    shown = Representation.open(moved)
    assert shown.about["kinds"] == ["raw", "sae"]
    for kind, count in (("raw", 32), ("sae", 20)):
        rows = shown.features(kind, live=False)
        assert len(rows) == count
        covered = [row["feature"] for row in rows if row["cover"]]
        assert len(covered) == 3
        for feature in covered:
            priors = shown.images(kind, feature, "prior")
            assert sorted({row["seed"] for row in priors}) == [1024, 1111]
            dreams = shown.images(kind, feature, "dream")
            assert sorted({(row["timestep"], row["seed"]) for row in dreams}) == [
                (time, seed) for time in (0.0, 500.0) for seed in (1024, 1111)
            ]
            assert {row["step"] for row in shown.images(kind, feature, "snapshot")} == {0, 2}
            assert all(set(row["figures"]) >= {"activation", "loss"} for row in dreams)
            examples = shown.images(kind, feature, "example")
            assert examples
            assert {row["text"] for row in examples} <= set(PROMPTS)
            assert all(len(row["map"]) == 64 for row in examples)
            assert len(shown.profile(kind, feature)["frequency"]) == 4
            for row in (*priors, *dreams, *examples):
                assert shown.path(row["image"]).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="path of images"):
        shown.path("../results/run/config.yaml")
    assert str(tiny) not in (moved / "index.json").read_text()
    for name in ("features", "profiles", "images"):
        assert str(tiny).encode() not in (moved / f"{name}.parquet").read_bytes()
    assert summary.headline["sae"]["count"] == 20
    assert (folder / "plots/sae").is_dir()
    html = (folder / "report.html").read_text()
    assert "Latents of the autoencoder" in html


def test_an_interrupted_run_goes_on_without_redoing_finished_features(tiny, monkeypatch):
    whole, _, _ = start(tiny, "use_raw=false", name="whole")
    dream, ran = Dreamer.__call__, []

    def counted(self, latents, chosen, *rest, **more):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(sorted(set(chosen)))
        return dream(self, latents, chosen, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Dreamer, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            start(tiny, "use_raw=false")
    assert len(ran) == 2
    left = []

    def after(self, latents, chosen, *rest, **more):
        left.append(sorted(set(chosen)))
        return dream(self, latents, chosen, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Dreamer, "__call__", after)
        folder, _, log = start(tiny, "use_raw=false")
    done, rest = {f for each in ran for f in each}, {f for each in left for f in each}
    assert done
    assert rest
    assert not done & rest
    assert "timestep_analysis: finished before, skipped" in log
    for mine, theirs in zip(Parts.open(folder / "deep_dream/sae"), Parts.open(whole / "deep_dream/sae"), strict=True):
        assert mine.items == theirs.items
        one, two = (load_file(part.files["safetensors"])["latents"] for part in (mine, theirs))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_stages_one_at_a_time_and_of_another_run(tiny):
    with pytest.raises(InputError, match="stage=capture first"):
        start(tiny, "stage=timestep_analysis", name="early")
    for stage in ("provision", "capture", "timestep_analysis", "plots", "prior"):
        folder, _, _ = start(tiny, f"stage={stage}", name="one")
    assert not (folder / "deep_dream").exists()
    links = [
        "deep_dream.prior_run=one",
        "deep_dream.timestep_analysis_run=one",
        "deep_dream.see_through_schedule_noise=false",
    ]
    other, _, _ = start(tiny, "stage=deep_dream", *links, name="two")
    assert not (other / "capture").exists()
    identity = Parts.open(other / "deep_dream/sae").identity
    assert identity["priors"] == Parts.open(folder / "prior/sae").content()
    with pytest.raises(InputError, match=r"nine.*one, .*two"):
        start(tiny, "stage=deep_dream", links[1], "deep_dream.prior_run=nine", name="three")
    torch.manual_seed(1)
    SparseAutoencoder(torch.randn(20, 32), torch.zeros(20), torch.randn(20, 32), torch.zeros(32), "topk", 3,
                      meta={"site": "up.1.0"}).save_pretrained(tiny / "sae")  # fmt: skip
    with pytest.raises(InputError, match="same model, site and autoencoder"):
        start(tiny, "stage=deep_dream", *links, "deep_dream.num_steps=4", name="four")


def test_ranks_share_a_stage_and_the_last_call_checks(tiny):
    for stage in ("provision", "capture", "timestep_analysis"):
        folder, _, _ = start(tiny, f"stage={stage}")
    for rank in (2, 0, 1):
        workers.work_on(folder, "prior", Share(rank, 3))
    seen = [item for part in Parts.open(folder / "prior/sae") for item in part.items]
    assert sorted(seen) == [0, 1, 2]
    rows = [
        row for part in Parts.open(folder / "prior/sae") for row in pq.read_table(part.files["parquet"]).to_pylist()
    ]
    assert len({(row["feature"], row["seed"]) for row in rows}) == len(rows) == 6
    start(tiny, "stage=prior")
    with pytest.raises(InputError, match="capture, prior, deep_dream"):
        workers.work_on(folder, "plots", Share())
    assert run_command(["dream-worker", str(folder), "prior", "--rank", "1"]) == 2
    assert run_command(["dream-worker", str(tiny), "prior"]) == 2


def test_a_worker_that_fails_is_told(tiny, monkeypatch):
    folder, _, _ = start(tiny, "stage=provision")

    class Process:
        def __init__(self, command, env):
            self.rank = int(command[command.index("--rank") + 1])

        def wait(self):
            return self.rank  # all but the first fail

        def poll(self):
            return self.rank

    monkeypatch.setattr("pysteer.processes.subprocess.Popen", Process)
    with pytest.raises(PysteerError, match="workers 1, 2 of 3 failed"):
        start(tiny, "stage=capture", "workers=3")
    assert not list((folder / "capture").glob("part-*"))


def test_launchers_say_which_share_is_whose(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert workers.share_of_environment() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert workers.share_of_environment() == Share(3, 8)
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(InputError, match="whole numbers"):
        workers.share_of_environment()


def test_settings_of_latents_replace_those_of_channels():
    settings = DreamSettings(robustness="level_2", num_steps_sae=7)
    raw, latents = settings.config("raw"), settings.config("sae")
    assert (raw.num_steps, latents.num_steps) == (100, 7)
    assert (raw.total_variation_penalty_weight, latents.total_variation_penalty_weight) == (0.5, 0.0)
    assert (raw.moment_penalty_weight, latents.moment_penalty_weight) == (0.0, 0.5)
    assert (raw.jitter_max, raw.rotate_max, raw.scale_max) == (8, 15.0, 1.2)
    for given, message in (
        ({"stage": "dream"}, "provision"),
        ({"use_sae": False}, "site"),
        ({"workers": 0}, "workers"),
    ):
        with pytest.raises(InputError, match=message):
            DreamRecipeConfig(**given)


def test_the_example_is_a_configuration_of_the_recipe():
    path = Path(__file__).parents[2] / "examples/dream/colours.yaml"
    config = build_config(DreamRecipeConfig, read_values(path))
    assert config.sae in available()["autoencoders"]
    assert config.prior.guidance_scale > 1
    assert config.prior.prompt
