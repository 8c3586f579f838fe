"""SteerBench: prompts, measures, the leaderboard, and what may be concluded from it."""

import math

import pytest
import torch

import pysteer
from bench import effect
from bench.steerbench import board, images
from bench.steerbench.cells import QUICK, QUICK_SUITE, SUITE, Cell, Sizes, cells_of, main_pairs, plain
from bench.steerbench.shares import run_shares, share_of
from pysteer.errors import PysteerError
from pysteer.models.load import load_model
from pysteer.recipes.prototype.judge import Judgement
from pysteer.zoo.shapes.captions import parse_caption


@pytest.mark.parametrize("concept", list(images.CONCEPTS))
def test_target_prompts_differ_from_source_prompts_in_the_concept_alone(concept):
    given, wanted = images.CONCEPTS[concept]
    fit = images.draw(concept, 40, seed=1)
    fresh = images.draw(concept, 20, seed=2, avoid=fit.source)
    assert not set(fit.source) & set(fresh.source)
    assert len(fit.source) == len(fit.target) == len(fit.seeds) == 40
    for source, target in zip(fit.source, fit.target, strict=True):
        a, b = parse_caption(source), parse_caption(target)
        assert {name: a[name] for name in given} == given
        assert {name for name in a if a[name] != b[name]} == set(wanted)
        assert all(value is None or b[name] == value for name, value in wanted.items())
    beside = images.bystanders(concept, 10, seed=3)
    assert all(parse_caption(text)[name] != value for text in beside.source for name, value in given.items())
    assert images.draw(concept, 40, seed=1) == fit


def test_hits_need_every_part_of_the_concept():
    seen = Judgement({"shape": ["square", "square", "circle", "star"], "colour": ["blue", "red", "blue", "blue"]}, None)
    assert images.hits(seen, "both") == [True, False, False, False]
    assert images.hits(seen, "shape") == [True, True, False, False]
    assert images.hits(seen, "negation") == [True, True, True, False]
    prompts = ["a blue square", "a square", "a circle on a red background", "a red star"]
    assert images.shows_stated(seen, prompts, ["colour"]) == [True, True, True, False]


def test_the_strength_is_chosen_by_one_rule():
    doses = [
        {"strength": 0.5, "target": 0.5, "kept": 1.0},
        {"strength": 1.0, "target": 0.9, "kept": 0.96},
        {"strength": 1.5, "target": 0.9, "kept": 0.97},
        {"strength": 2.0, "target": 1.0, "kept": 0.5},
    ]
    assert images.choose(doses)["strength"] == 1.0
    assert images.choose([{**dose, "kept": dose["kept"] - 0.6} for dose in doses])["strength"] == 0.5
    assert images.rising([0.1, 0.5, 0.5]) == 1.0
    assert images.rising([0.5, 0.1]) == 0.0


def cell(target, kept=1.0, beside=1.0, count=40, **given):
    def share(part, size=count):
        return [i < round(part * size) for i in range(size)]

    return {
        "target": share(target), "target_unsteered": share(0), "target_swap": share(1), "kept": share(kept),
        "kept_unsteered": share(1), "beside": share(beside, 20), "beside_unsteered": share(1, 20), "strength": 1.0,
        "place": "ca", "outside": [0.1, None], "distance": 4.0, "diversity": 1.0, "monotone": 1.0, **given,
    }  # fmt: skip


def results(**methods):
    found = []
    for name, rates in methods.items():
        method, _, control = name.partition("__")
        for seed, rate in enumerate(rates):
            key = {"generator": "g", "concept": "c", "method": method, "pairs": 96, "control": control, "seed": seed}
            found.append({**key, "measured": cell(rate)})
    return found


def test_scores_are_products_and_intervals_hold_what_was_measured():
    row = board.summarise([cell(0.5, kept=0.8, beside=0.5)] * 3)
    assert row["score"]["value"] == pytest.approx(0.5 * 0.8 * 0.5)
    for name in ("target", "kept", "specific", "score"):
        assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    assert 0.3 < row["target"]["low"] < 0.5 < row["target"]["high"] < 0.7
    assert row["outside"] == pytest.approx(0.1)
    assert row["swap"] == 1.0


def test_seeds_that_disagree_widen_the_interval():
    same, apart = board.summarise([cell(0.5)] * 4), board.summarise([cell(r) for r in (0.1, 0.9, 0.1, 0.9)])
    width = [row["target"]["high"] - row["target"]["low"] for row in (same, apart)]
    assert width[1] > 2 * width[0]


def test_only_separated_intervals_are_conclusions():
    rows = board.board_of(results(good=[0.95] * 3, bad=[0.2] * 3, near=[0.9] * 3))
    assert [row["method"] for row in rows] == ["good", "near", "bad"]
    (text,) = board.conclusions(rows, 96)
    assert text == "g, c: good has the highest score, above bad; not separated from near."
    (text,) = board.conclusions(board.board_of(results(good=[0.95] * 3, near=[0.9] * 3)), 96)
    assert "no interval separates it" in text


def test_a_control_that_works_is_said():
    rows = board.board_of(results(good=[0.9] * 3, good__shuffled=[0.9] * 3, good__random=[0.0] * 3))
    (text,) = board.conclusions(rows, 96)
    assert "its control (shuffled) is not separated from good" in text
    assert "random" not in text


def test_methods_without_a_control_are_left_out_of_the_board():
    left = {"generator": "g", "concept": "c", "method": "m", "pairs": 96, "control": "random", "seed": 0}
    assert board.board_of([{**left, "measured": {"left_out": "no such control", "seconds": 0.1}}]) == []


def test_the_table_and_the_figure(tmp_path):
    rows = board.board_of(results(good=[0.95] * 2, good__shuffled=[0.0] * 2))
    lines = board.table(rows).splitlines()
    assert lines[2].startswith("| g | c | good | 96 | 95 [")
    assert "good (shuffled)" in lines[3]
    assert board.figure(rows, 96, tmp_path / "board.svg").stat().st_size > 1000


def test_the_suite_is_balanced_and_keys_are_names_of_their_own():
    cells = cells_of(SUITE, Sizes())
    assert len({one.key for one in cells}) == len(cells)
    plain_cells = [c for c in cells if not c.control and c.pairs == main_pairs(c.concept, Sizes().pairs)]
    for generator, (concepts, methods) in SUITE.items():
        own = [one for one in plain_cells if one.generator == generator]
        assert len(own) == len(concepts) * len(methods) * Sizes().seeds
        found = {one.pairs for one in cells if one.generator == generator}
        assert found == ({8, 32, 64} if generator == "smollm2" else {8, 32, 96, 128, 512})
    assert plain(math.nan) is None
    assert plain(0.5) == 0.5


def test_cells_that_were_measured_are_read_again(tmp_path, monkeypatch):
    calls = []

    class Bench:
        def measure(self, one):
            calls.append(one)
            return cell(0.5)

    monkeypatch.setattr(effect, "bench_for", lambda generator, sizes: Bench())
    cells = [Cell("g", "c", "m", 8, seed) for seed in range(3)]
    first = effect.measure_all(cells[:2], QUICK, tmp_path)
    again = effect.measure_all(cells, QUICK, tmp_path)
    assert len(calls) == 3
    assert again[:2] == first
    assert effect.measure_all([Cell("g", "c", "other", 8, 0)], QUICK, tmp_path, limit=-1.0) == []
    late = [Cell("g", "c", "other", 8, 0), *cells]
    assert effect.measure_all(late, QUICK, tmp_path, limit=-1.0) == again
    assert len(calls) == 3


def test_how_long_it_took_is_told_where_it_was_measured_in_one_go(tmp_path, monkeypatch, capsys):
    class Bench:
        def measure(self, one):
            return cell(0.5)

    monkeypatch.setattr(effect, "bench_for", lambda generator, sizes: Bench())
    words = ["--quick", "--generator", "infinity-shapes", "--dry-run", "--processes", "1", "--folder", str(tmp_path)]
    told = []
    for _ in range(2):
        effect.main(words)
        told.append("Measured in one go in 0.0 minutes." in capsys.readouterr().out)
    assert told == [True, False]  # the second start reads what the first has measured


def test_shares_are_all_cells_once_and_keep_what_shares_images():
    cells = cells_of(QUICK_SUITE, Sizes())
    shares = [share_of(cells, i, 3) for i in range(3)]
    assert sorted(one.key for share in shares for one in share) == sorted(one.key for one in cells)
    assert len(cells) == len({one.key for one in cells})
    groups = [{(one.generator, one.concept, one.seed) for one in share} for share in shares]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    for generator in QUICK_SUITE:
        counts = [sum(one.generator == generator for one in share) for share in shares]
        assert max(counts) - min(counts) <= max(
            sum((one.generator, one.concept, one.seed) == group for one in cells) for own in groups for group in own
        )


@pytest.mark.parametrize("concept", ["shape", "colour"])  # fitted site after site, and at once
def test_cells_of_a_seed_share_their_examples_and_equal_a_fit_of_their_own(concept, monkeypatch):
    sizes = Sizes(seeds=1, pairs=6, efficiency=(4,), search=2, prompts=2, beside=2)
    bench = images.ImageBench("infinity-shapes", load_model("infinity-shapes"), sizes)
    data = images.draw(concept, 6, 1)
    ran = []
    generate = type(bench.pipe).__call__

    def counted(pipe, prompts, **given):
        ran.extend(prompts)
        return generate(pipe, prompts, **given)

    monkeypatch.setattr(type(bench.pipe), "__call__", counted)
    counts = {}
    for method, pairs, control in (
        ("mean_difference@visual", 6, ""), ("prototype:clusters=2@visual", 6, ""), ("mean_difference@visual", 4, ""),
        ("mean_difference@visual", 6, "shuffled"),
    ):  # fmt: skip
        one = Cell("infinity-shapes", concept, method, pairs, 0, control)
        contender = images.find_contenders([method], bench.pipe, concept)[0]
        ran.clear()
        fitted = bench._fit(one, contender, data)
        counts[method[:4], pairs, control] = len(ran)
        alone = pysteer.fit(
            bench.pipe, contender.method, data.source[:pairs], data.target[:pairs], sites=contender.place.sites,
            steps=contender.place.steps, sequential=contender.place.sequential, seeds=data.seeds[:pairs],
            control=control or None, settings=bench.painter.settings,
        )  # fmt: skip
        for a, b in zip(fitted.parameters, alone.parameters, strict=True):
            # Batches of another size round differently, which later sites of a sequential fit carry on.
            assert all(torch.allclose(a.tensors[name], b.tensors[name], atol=2e-3) for name in a.tensors)
            assert any(float(tensor.abs().max()) > 0 for tensor in a.tensors.values())
    source = 1 if concept == "shape" else 0  # steered while it runs, so it runs for every fit
    assert counts["mean", 6, ""] == 12
    assert counts["prot", 6, ""] == 6 * source
    assert counts["mean", 4, ""] == 4 * source
    assert counts["mean", 6, "shuffled"] in range(6 * source, 12 * source + 1)


def test_a_share_that_fails_is_said(tmp_path):
    words = ["--generator", "no-such-generator", "--folder", str(tmp_path), "--dry-run", "--quick"]
    with pytest.raises(PysteerError, match=r"share \d of 2 of the cells ended with code"):
        run_shares(words, 2)


def test_one_real_cell_changes_the_class(tmp_path):
    sizes = Sizes(seeds=1, pairs=24, efficiency=(), search=4, prompts=8, beside=4)
    bench = images.ImageBench("infinity-shapes", load_model("infinity-shapes"), sizes)
    made = bench.measure(Cell("infinity-shapes", "colour", "mean_difference@text", 24, 0))
    made |= {"seconds": 0.0}
    assert len(made["target"]) == 8
    assert len(made["beside"]) == 4
    assert len(made["doses"]) == 5
    assert sum(made["target_unsteered"]) <= 1
    assert sum(made["target_swap"]) >= 7
    assert made["distance"] > 0  # something changed
    row = board.summarise([made])
    assert 0 <= row["score"]["value"] <= 1
