import pytest

from pysteer.errors import InputError
from pysteer.recipes.grid import parse_subset, write_grid
from pysteer.recipes.setup_file import read_setup

WORDS = ["scales=all,3-4", "layers=all,0+2", "strength_cond=1,2,4", "strength_uncond=0", "strength_text=0,1"]


def test_every_combination_is_a_readable_file(tmp_path):
    paths = write_grid(tmp_path / "setup", WORDS)
    assert len(paths) == len({path.name for path in paths}) == 2 * 2 * 3 * 2
    setups = [read_setup(path) for path in paths]
    assert len({str(setup) for setup in setups}) == len(setups)
    for setup in setups:
        setup.check(5, 6, 2)
    name = "setup_scales-3-4_layers-0+2_cond-2_uncond-0_text-1.json"
    table = read_setup(tmp_path / "setup" / name).strengths(6)
    assert table == {0: {3: (2.0, 0.0), 4: (2.0, 0.0)}, 2: {3: (2.0, 0.0), 4: (2.0, 0.0)}}


def test_dry_run_writes_nothing(tmp_path):
    paths = write_grid(tmp_path / "setup", WORDS, dry_run=True)
    assert len(paths) == 24
    assert not (tmp_path / "setup").exists()


def test_existing_files_are_not_overwritten(tmp_path):
    before = write_grid(tmp_path, ["strength_cond=2"])[0].read_text()
    with pytest.raises(InputError, match="1 of 2 setup files exist"):
        write_grid(tmp_path, ["strength_cond=1,2"])
    assert [path.read_text() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scales=5"], "subset of scales.*got '5'.*0 to 4"),
        (["layers=4-2"], "subset of layers"),
        (["strength_cond=x"], "strength_cond"),
        (["strenght_cond=1"], "did you mean strength_cond"),
        (["strength_cond=1,1"], "two with one name"),
        (["prefix=../x"], "prefix"),
        (["scales="], "got 0"),
    ],
)
def test_bad_words_are_named_and_nothing_is_written(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        write_grid(tmp_path / "setup", words)
    assert not (tmp_path / "setup").exists()


def test_other_models_have_other_sizes(tmp_path):
    path = write_grid(tmp_path, ["model_scales=7", "model_layers=12", "layers_text=22+23", "strength_text=5"])[0]
    setup = read_setup(path)
    setup.check(7, 12, 24)
    assert setup.text_layers == (22, 23)
    assert len(setup.strengths(12)) == 12


def test_subsets():
    assert parse_subset("all", 3, "x") == (0, 1, 2)
    assert parse_subset("none", 3, "x") == ()
    assert parse_subset("0+2-3", 5, "x") == (0, 2, 3)
