from pathlib import Path

import pytest

from pysteer.errors import InputError
from pysteer.recipes.config import build_config, merge_values, parse_words, read_values
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.setup_file import read_setup
from pysteer.recipes.source_config import experiment_file, prepare, read_infinity

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "infinity-prototype"

# Every key of the format, as a user of the scripts writes them: beside the Infinity folder, paths from inside it.
SOURCE = """
DATASET: shapes_colors
DATASET_PATH: ../data/shapes.json
STEERING_TYPE: BOTH
STEERING_LOCATION: ca
VARIANT: 0
BATCH_SIZE: 16
CFG: 4
DISTANCE: MAHALANOBIS
STEERING_MODE: BOTH
EXPERIMENT_DIR: ../experiment_7
EXPERIMENT_SETUP: setup.json
GRID_PATH: grid.png
CLASSIFIER_WEIGHTS:
UNCHANGED_SAVED: ../experiment_7/weights/unchanged.safetensors
FID: False
"""

OFFICIAL = """
model_path: weights/infinity_125M_256x256.pth
vae_path: weights/infinity_vae_d16.pth
text_encoder_ckpt: weights/flan-t5-xl
model_type: infinity_layer12
vae_type: 16
pn: 0.06M
text_channels: 2048
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "experiment_7" / "weights").mkdir(parents=True)
    (tmp_path / "experiment_7" / "weights" / "unchanged.safetensors").write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes.json").write_text("{}")
    path = tmp_path / "experiment_7" / "experiment_configuration.yml"
    path.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return path


def load(path, *words):
    values = prepare(merge_values(read_values(path)), path.parent)
    return build_config(PrototypeConfig, merge_values(values, parse_words(words)))


def test_every_key_of_the_source_is_taken(project):
    config = load(project)
    assert (config.steering_type, config.steering_location, config.steering_mode) == ("BOTH", "ca", "BOTH")
    assert (config.variant, config.batch_size, config.cfg, config.distance) == (0, 16, 4.0, "MAHALANOBIS")
    assert config.fid is False
    assert config.classifier_weights == ""
    assert Path(config.dataset_path).resolve() == project.parents[1] / "data" / "shapes.json"
    assert Path(config.experiment_dir).resolve() == project.parent
    assert config.kinds == ("both",)


def test_the_habit_of_paths_from_the_infinity_folder(project):
    config = load(project)
    found = experiment_file(config.experiment_dir, "weights", config.unchanged_saved)
    assert found.resolve() == project.parent / "weights" / "unchanged.safetensors"
    assert experiment_file("e", "setup", "a.json") == Path("e/setup/a.json")
    assert experiment_file("experiment_7", "weights", "weights/unchanged.safetensors").exists()


def test_words_win_over_the_file(project):
    assert load(project, "VARIANT=1", "cfg=2").variant == 1
    assert load(project, "CFG=2").cfg == 2.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("STEERING_LOCATOIN: ca", "did you mean steering_location"),
        ("STEERING_TYPE: AUDIO", "AUDIO.*EACH, TEXT, VISUAL, BOTH"),
        ("VARIANT: 2", "variant.*got 2.*0, 1"),
        ("BATCH_SIZE: 0", "batch_size.*got 0"),
        ("DATASET_PATH: nowhere.json", "DATASET_PATH not found.*nowhere"),
    ],
)
def test_bad_values_are_one_line(project, line, message):
    key = line.split(":")[0]
    kept = [row for row in SOURCE.splitlines() if not row.startswith(key + ":")]
    project.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=message) as caught:
        load(project)
    assert "\n" not in str(caught.value)


def test_example_files_are_complete():
    config = load(EXAMPLE / "experiment_configuration.yml", f"experiment_dir={EXAMPLE}")
    assert config.kinds == ("visual",)
    assert Path(config.dataset_path).is_file()
    setup = read_setup(experiment_file(config.experiment_dir, "setup", config.experiment_setup))
    setup.check(5, 6, 2)
    assert sorted(setup.strengths(6)[0]) == [3, 4]
    assert read_infinity(EXAMPLE / "infinity_configuration.yml").model == "infinity-shapes"
    for path in (EXAMPLE / "setup").glob("*.json"):
        read_setup(path).check(5, 6, 2)


def test_official_fields_are_read(tmp_path):
    path = tmp_path / "infinity_configuration.yml"
    path.write_text(OFFICIAL + "rope2d_normalized_by_hw: 2\ncheckpoint_type: torch\n")
    found = read_infinity(path)
    assert (found.model_type, found.vae_type, found.pn, found.model) == ("infinity_layer12", 16, "0.06M", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model_typ: infinity_2b", "did you mean model_type"),
        ("model_type: infinity_3b", "infinity_3b"),
        ("model_type: infinity_2b", "vae_type.*got 16.*32 for infinity_2b"),
        ("pn: 2M", "2M"),
        ("use_bit_label: 0", "use_bit_label.*got 0"),
        ("text_channels: 768", "2048"),
        ("vae_path:", "missing key.*vae_path"),
    ],
)
def test_fields_that_do_not_match_are_named(tmp_path, line, message):
    path = tmp_path / "infinity_configuration.yml"
    kept = [row for row in OFFICIAL.splitlines() if not row.startswith(line.split(":")[0] + ":")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=message):
        read_infinity(path)
