"""The recipe: resumes bit for bit, takes published files, finds and revives what was planted, says what is wrong."""

import csv
import errno
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes import execute
from pysteer.recipes.config import build_config, merge_values, parse_words
from pysteer.recipes.frame import find_recipe, resolve_config
from pysteer.recipes.vae.cells import train_and_evaluate
from pysteer.recipes.vae.config import VaeDynamicsConfig
from pysteer.recipes.vae.data import open_images
from pysteer.recipes.vae.trainer import Trainer

SMALL = [
    "data.resolution=16", "data.max_samples=24", "data.validation_max_samples=8", "data.batch_size=4",
    "training.max_train_steps=8", "training.lr_warmup_steps=2", "training.validation_steps=4",
    "tracking.track_interval=2", "model.plant=0.1", "device=cpu", "intervention.intervention_interval=2",
    "dead_neuron_tracking.track_interval=4", "saving.save_interval_steps=3", "logging.log_interval=1",
    "logit_lens.enabled=false", "evaluation.samples=8", "evaluation.num_samples_to_save=2",
]  # fmt: skip
AVERAGE = ["training.ema_decay=0.9", "training.adversarial_weight=0.1", "training.gradient_accumulation_steps=2"]
LAST = ["tracking.window=last", "tracking.track_interval=4"]
PRECISE = ["training.perceptual_weight=0.1", "training.mixed_precision=bf16"]
LENS = ["logit_lens.enabled=true", "logit_lens.visualization_interval=1"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _config(*words: str) -> VaeDynamicsConfig:
    return build_config(VaeDynamicsConfig, parse_words([*SMALL, *words]))


@pytest.fixture(autouse=True)
def _smaller_than_tiny(monkeypatch):
    monkeypatch.setattr("pysteer.recipes.vae.model._WIDTHS", {"tiny": (8, 8)})


def _trained(folder: Path, config: VaeDynamicsConfig, stop: int | None = None) -> Trainer:
    images = open_images(config.data, "train")
    held = open_images(config.data, "test", validation=True)
    trainer = Trainer(config, "nudge", 0, folder, images, held)
    if stop is None:
        trainer.run()
        return trainer

    def interrupt(done: float, total: float | None = None) -> None:
        assert total == trainer.total
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(interrupt)
    return trainer


@pytest.mark.parametrize("words", [[], AVERAGE, [*LAST, *PRECISE]])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, words):
    config = _config(*words)
    whole = _trained(tmp_path / "whole", config)
    _trained(tmp_path / "parts", config, stop=5)
    assert [path.name for path in (tmp_path / "parts").glob("chkpt-*")] == ["chkpt-3"]
    resumed = _trained(tmp_path / "parts", config)
    assert resumed.step == whole.step == 8
    for name in ("vae", "vae_ema") if config.training.ema_decay else ("vae",):
        a, b = (
            load_file(tmp_path / run / "final_model" / name / "diffusion_pytorch_model.safetensors")
            for run in ("whole", "parts")
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert resumed.log_rows == whole.log_rows
    assert resumed.validations == whole.validations
    for name in ("tracked_activation_stats", "intervention_history", "dead_neuron_percentage_history", "nudges"):
        assert (tmp_path / "whole" / f"{name}.csv").read_text() == (tmp_path / "parts" / f"{name}.csv").read_text(), (
            name
        )
    pairs = zip(*(t.observers.monitor.history.windows() for t in (whole, resumed)), strict=True)
    assert all(a.step == b.step and torch.equal(a.moments, b.moments) for a, b in pairs)
    assert whole.log_rows[0]["loss"] > whole.log_rows[-1]["loss"]


def test_two_seeds_and_two_conditions_with_a_report(tmp_path):
    words = [
        *SMALL,
        "seeds=2",
        "conditions=baseline,nudge",
        "logit_lens.enabled=true",
        "logit_lens.visualization_interval=8",
    ]
    words += ["training.max_train_steps=10", "training.learning_rate=1e-4", "classification.method=gamma"]
    folder, summary = execute("vae-dynamics", words, out=tmp_path)
    rows = {(row["condition"], row["seed"]): row for row in summary.tables["trainings"]}
    assert sorted(rows) == [("baseline", 42), ("baseline", 43), ("nudge", 42), ("nudge", 43)]
    for (condition, _), row in rows.items():
        assert row["planted_found"] == row["planted_total"] > 0
        assert row["planted_revived"] == (row["planted_total"] if condition == "nudge" else 0)
        assert (row["nudges"] > 0) == (condition == "nudge")
    mse = summary.headline["mse"]
    assert mse["pairs"] == 2
    assert mse["low"] <= mse["difference"] <= mse["high"]
    report = (folder / "report.html").read_text()
    assert "Baseline against nudge" in report
    assert "were found" in report
    own = folder / "runs/nudge-seed42"
    made = [
        "tracked_activation_stats.csv", "intervention_history.csv", "dead_neuron_percentage_history.csv",
        "dead_neuron_percentage_history.png", "activity_plots/activation_evo_mean_mean.png", "dead_vs_nudge.png",
        "final_model/vae/config.json", "final_model/eval_results_test/eval_metrics.txt",
        "final_model/eval_results_test/sample_1_orig.png", "final_model/eval_results_test/sample_1_recon.png",
        "final_model/eval_results_test/out_1.png", "logit_lens_visualizations/step_8/ablation.csv",
    ]  # fmt: skip
    assert [name for name in made if not (own / name).is_file()] == []
    assert list(own.glob("logit_lens_visualizations/step_8/*/logit_lens_projections/lens_sample_0_full_map.png"))
    with (own / "tracked_activation_stats.csv").open() as stream:
        columns = ["global_step", "layer_identifier", "original_metric_name", "metric_type", "metric_value"]
        assert next(csv.reader(stream)) == columns
    again, repeated = execute("vae-dynamics", words, out=tmp_path)
    assert again == folder
    assert repeated.tables == summary.tables


def test_a_trained_model_is_evaluated_again(tmp_path):
    config = _config()
    result = train_and_evaluate(config, "nudge", 0, tmp_path / "run")
    words = [*SMALL, "stage=evaluate", f"checkpoint_path={tmp_path / 'run/final_model'}"]
    folder, summary = execute("vae-dynamics", words, out=tmp_path)
    assert summary.best == pytest.approx(result["evaluation"])
    text = (folder / "eval_results_test/eval_metrics.txt").read_text()
    assert "Average MSE: " in text
    assert "Number of Samples Processed: 8" in text
    with pytest.raises(InputError, match="checkpoint_path"):
        execute("vae-dynamics", [*SMALL, "stage=evaluate", "checkpoint_path=/nowhere"], out=tmp_path, run_name="other")


PUBLISHED = """
project_name: vae-dyn
run_name: some_nudge
output_dir: ./results
data: {dataset_name: uoft-cs/cifar10, image_column: img, resolution: 64, batch_size: 64, num_workers: 4,
       validation_split_name: test, max_samples: null}
training: {num_train_epochs: 50, learning_rate: 5e-5, kl_weight: "1e-6", validation_epochs: 1, validation_steps: 0}
logging: {log_interval: 20, report_to: wandb}
saving: {save_interval_steps: 1000, checkpoint_dir_prefix: chkpt}
dead_neuron_tracking: {enabled: true, track_interval: 20, threshold: 1e-3}
tracking:
  enabled: true
  track_interval: 20
  target_layers:
    - {name: "vae.encoder.conv_in", capture_point: "output", metrics: ["mean_abs_activation_per_channel"]}
classification: {enabled: true, method: threshold_groupnorm_activity, threshold: 0.2,
                 target_metric_key: mean_abs_activation_per_channel,
                 layers_to_classify: [vae.encoder.down_blocks.0.resnets.0.norm1.output]}
intervention: {enabled: true, strategy: gentle_nudge_groupnorm_scale, nudge_factor: 1.10, max_scale_value: 1.5,
               intervention_interval: 20}
"""
BASE = """
seed: 7
training: {adam_weight_decay: 1e-2, adam_epsilon: 1e-08, learning_rate: 1e-5, lr_warmup_steps: 100}
saving: {save_interval: 500}
threshold: 1e-8
"""


def test_published_files_are_taken(tmp_path):
    files.write_text(tmp_path / "base_config.yaml", BASE)
    files.write_text(tmp_path / "nudge.yaml", "defaults:\n  - base_config\n" + PUBLISHED)
    config = resolve_config(find_recipe("vae-dynamics"), ["seeds=2"], tmp_path / "nudge.yaml")
    assert (config.seed, config.seeds, config.training.learning_rate) == (7, 2, 5e-5)
    assert (config.training.adam_weight_decay, config.training.adam_epsilon) == (1e-2, 1e-8)
    assert (config.training.lr_warmup_steps, config.training.max_train_steps) == (100, None)
    assert config.saving.every == 500
    assert config.dead_neuron_tracking.threshold == 1e-3
    assert config.classification.threshold == 0.2
    assert config.intervention.nudge_factor == 1.1
    assert config.data.max_samples is None
    assert config.cells == [("nudge", 7), ("nudge", 8)]
    off = "classification: {enabled: false}\nintervention: {enabled: false}\n"
    files.write_text(tmp_path / "baseline.yaml", off)
    assert resolve_config(find_recipe("vae-dynamics"), (), tmp_path / "baseline.yaml").cells == [("baseline", 42)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["intervention.nudge_facto=1.1"], "did you mean intervention.nudge_factor?"),
        (["intervention.strategy=shove"], "gentle_nudge_groupnorm_scale"),
        (["conditions=baseline,other"], "baseline, nudge"),
        (["classification.enabled=false"], "with classification and tracking"),
        (["model.plant=1"], "below 1"),
        (["stage=evaluate"], "checkpoint_path"),
        (["data.batch_size=0"], "from 1"),
    ],
)
def test_keys_that_do_not_fit_are_said(words, says):
    with pytest.raises(InputError) as caught:
        _config(*words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tracking.target_layers=encoder.conv_inn"], "did you mean encoder.conv_in?"),
        (["classification.method=activity"], "unknown"),
        (["classification.layers_to_classify=encoder.conv_in"], "not watched"),
        (["data.dataset_name=fashion-mnist", "data.path=/nowhere"], "dataset-fashion-mnist"),
        (["data.dataset_name=no-such/data-set"], "glyphs, fashion-mnist, shapes"),
        (["data.validation_split_name=dev"], "train, test"),
        (["model.pretrained_vae_name=/nowhere/at/all"], "cannot be loaded"),
        (["training.mixed_precision=fp16"], "no, bf16 on a CPU"),
        ([*LENS, "logit_lens.layers_to_analyze_direct=nothing"], "no layer"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_lost(tmp_path, monkeypatch, words, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "classification.method=activity" in words:
        says = "method of classification"
    with pytest.raises(InputError) as caught:
        execute("vae-dynamics", [*SMALL, *words], out=tmp_path)
    if says == "glyphs, fashion-mnist, shapes" and "cannot be loaded" in str(caught.value):
        return  # `datasets` is installed here and has a message of its own
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def _pictures(folder: Path, count: int = 24) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        files.write_image(folder / f"{number:03d}.png", Image.fromarray(pixels.numpy()))


def test_an_unreadable_image_stops_with_its_name_and_the_run_goes_on_when_it_is_gone(tmp_path):
    _pictures(tmp_path / "pictures")
    bad = tmp_path / "pictures/004.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    words = [*SMALL, f"data.dataset_name={tmp_path / 'pictures'}", "saving.save_interval_steps=1"]
    with pytest.raises(InputError, match=r"004\.png"):
        execute("vae-dynamics", words, out=tmp_path)
    held = sorted((tmp_path / "vae-dynamics").glob("chkpt-*"))
    bad.write_bytes(good)
    folder, summary = execute("vae-dynamics", words, out=tmp_path)
    assert summary.best["condition"] == "nudge"
    assert len(held) <= 1
    bad.write_bytes(good[:40])
    config = _config(f"data.dataset_name={tmp_path / 'pictures'}", "data.skip_unreadable=true")
    assert len(open_images(config.data, "train")) == 20
    assert len(open_images(config.data, "test")) == 3
    assert folder.is_dir()


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    config = _config("saving.save_interval_steps=2")
    expected = _trained(tmp_path / "whole", config)
    write, count = files.write_safetensors, [0]

    def fills_up(path, *arguments, **keywords):
        if "chkpt-4" in str(path):
            count[0] += 1
            if count[0] == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **keywords)

    monkeypatch.setattr(files, "write_safetensors", fills_up)
    with pytest.raises(InputError, match="continues from step 2"):
        _trained(tmp_path / "run", config)
    assert [path.name for path in (tmp_path / "run").glob("*chkpt*")] == ["chkpt-2"]
    monkeypatch.setattr(files, "write_safetensors", write)
    resumed = _trained(tmp_path / "run", config)
    assert resumed.log_rows == expected.log_rows


@contextmanager
def _no_file_above(size: int):
    """What the system itself says when a file may not grow: errors come from the write, not from a stand-in."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_real_write_that_fails_is_said_in_one_line_wherever_it_happens(tmp_path, monkeypatch):
    config = _config("saving.save_interval_steps=2")
    expected = _trained(tmp_path / "whole", config)
    model = (tmp_path / "whole/final_model/vae" / WEIGHTS).stat().st_size
    with _no_file_above(model + 4096), pytest.raises(InputError, match=r"for checkpoint: .*chkpt-2.* starts again"):
        _trained(tmp_path / "run", config)  # the optimizer holds twice the model
    assert list((tmp_path / "run").glob("*chkpt*")) == []
    write = files.write_safetensors

    def full_from_now_on(path, *arguments, **keywords):
        if "channel_history" not in str(path) or not (tmp_path / "run/chkpt-4").is_dir():
            return write(path, *arguments, **keywords)
        with _no_file_above(100):
            return write(path, *arguments, **keywords)

    monkeypatch.setattr(files, "write_safetensors", full_from_now_on)
    with pytest.raises(InputError, match=r"for files of a training: .* continues from step 4"):
        train_and_evaluate(config, "nudge", 0, tmp_path / "run")
    monkeypatch.setattr(files, "write_safetensors", write)
    train_and_evaluate(config, "nudge", 0, tmp_path / "run")
    assert list((tmp_path / "run").rglob("*.tmp*")) == []
    assert json.loads((tmp_path / "run/result.json").read_text())["log"] == expected.log_rows
    a, b = (load_file(tmp_path / run / "final_model/vae" / WEIGHTS) for run in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_infinite_losses_are_said():
    with pytest.raises(InputError, match="learning_rate"):
        _trained(Path("/tmp/never-written"), _config("training.learning_rate=1e30", "training.max_grad_norm=1e30"))


def test_results_are_plain_json(tmp_path):
    result = train_and_evaluate(_config("training.max_train_steps=2"), "baseline", 1, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["evaluation"] == pytest.approx(result["evaluation"])


def test_deep_merge_keeps_nested_values():
    merged = merge_values({"training": {"adam_beta1": 0.8, "learning_rate": 1}}, {"training": {"learning_rate": 2}})
    assert build_config(VaeDynamicsConfig, merged).training.adam_beta1 == 0.8
