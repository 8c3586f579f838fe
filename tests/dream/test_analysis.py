"""From captured rows to frequencies, peaks and examples, against sums written out in full."""

import numpy as np
import pytest
import torch

from pysteer.dream.analysis import Analysis, analyse, image_scores
from pysteer.dream.capture import Block
from pysteer.dream.examples import TopExamples
from pysteer.dream.selectivity import auroc, selectivity
from pysteer.errors import InputError

ROWS, STEPS, LATENTS, KEPT = 23, 5, 11, 6
TIMES = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])  # as a run goes through them


def captured(seed=0):
    """Dense means [N, S, M] and the same as blocks of 7 rows."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(ROWS, STEPS, LATENTS, generator=generator) * (torch.rand(ROWS, STEPS, LATENTS) > 0.3)
    blocks = []
    for first in range(0, ROWS, 7):
        part = dense[first : first + 7]
        values, indices = part.topk(KEPT, dim=2)
        tensors = {
            "values": values, "indices": indices.int(), "sum": part.sum(0), "max": part.amax(0), "min": part.amin(0),
            "active": (part > 0).sum(0),
        }  # fmt: skip
        blocks.append(Block([{"row": first + i} for i in range(len(part))], tensors, TIMES))
    return dense, blocks


@pytest.fixture
def found(monkeypatch):
    dense, blocks = captured()
    monkeypatch.setattr("pysteer.dream.analysis.read_blocks", lambda parts, kind, role: iter(blocks))
    return dense, analyse(None, "sae", top_k=3, examples=4)


def test_frequency_mean_and_largest_are_those_of_all_rows(found):
    dense, analysis = found
    back = dense.flip(1)  # timesteps rise in the analysis
    assert analysis.timesteps.tolist() == sorted(TIMES.tolist())
    chosen = torch.zeros_like(back).scatter(2, back.topk(3, dim=2).indices, 1.0) * (back > 0)
    torch.testing.assert_close(analysis.frequency, chosen.mean(0).T)
    torch.testing.assert_close(analysis.mean, back.mean(0).T)
    torch.testing.assert_close(analysis.most, back.amax(0).T)
    torch.testing.assert_close(analysis.active, (back > 0).float().mean(0).T)
    assert analysis.frequency.max() <= 1
    assert analysis.rows == ROWS


def test_examples_are_the_rows_with_the_largest_values(found):
    dense, analysis = found
    back = dense.flip(1)
    top = torch.zeros_like(back, dtype=torch.bool).scatter(2, back.topk(3, dim=2).indices, True) & (back > 0)
    for feature in range(LATENTS):
        for step in range(STEPS):
            rows = top[:, step, feature].nonzero()[:, 0].tolist()
            rows.sort(key=lambda row: (-float(back[row, step, feature]), row))
            kept = [row for row in analysis.example_rows[feature, step].tolist() if row >= 0]
            assert kept == rows[:4]
            values = analysis.example_values[feature, step][: len(kept)].tolist()
            assert values == [float(back[row, step, feature]) for row in kept]


def test_more_than_was_kept_is_refused(monkeypatch):
    _, blocks = captured()
    monkeypatch.setattr("pysteer.dream.analysis.read_blocks", lambda parts, kind, role: iter(blocks))
    with pytest.raises(InputError, match="1 to 6"):
        analyse(None, "sae", top_k=7)
    monkeypatch.setattr("pysteer.dream.analysis.read_blocks", lambda parts, kind, role: iter(()))
    with pytest.raises(InputError, match="capture first"):
        analyse(None, "sae")


def test_scores_of_images_average_the_steps(monkeypatch):
    dense, blocks = captured()
    monkeypatch.setattr("pysteer.dream.analysis.read_blocks", lambda parts, kind, role: iter(blocks))
    kept = torch.zeros_like(dense).scatter(2, dense.topk(KEPT, dim=2).indices, 1.0)
    torch.testing.assert_close(image_scores(None, "sae", "cond", LATENTS), (dense * kept).mean(1))


def made(frequency, times=(100.0, 300.0, 500.0, 700.0, 900.0)):
    frequency = torch.tensor([frequency])
    empty = torch.zeros(1, frequency.shape[1], 0)
    return Analysis("sae", "cond", torch.tensor(times), frequency, frequency, frequency, frequency, empty,
                    empty.long(), 10)  # fmt: skip


def test_peaks_intervals_and_profile():
    analysis = made([0.1, 0.5, 0.0, 0.3, 0.3])
    assert analysis.peaks(0) == [(300, pytest.approx(0.5)), (800, pytest.approx(0.3))]  # the middle of a plateau
    assert analysis.peaks(0, most=1) == [(300, pytest.approx(0.5))]
    assert analysis.peaks(0, threshold=0.4) == [(300, pytest.approx(0.5))]
    assert analysis.peaks(0, separation=600) == [(300, pytest.approx(0.5))]
    assert analysis.intervals(0) == [(100.0, 300.0), (700.0, 900.0)]
    profile = analysis.profile(0)
    assert len(profile) == 1001
    assert profile[200] == pytest.approx(0.3)
    assert profile[99] == profile[901] == 0.0
    assert made([0.0] * 5).peaks(0) == []
    assert made([0.0] * 5).intervals(0) == []
    assert made([0.9, 0.2, 0.1, 0.0, 0.0]).peaks(0)[0][0] == 100  # at the end of what was captured


def test_an_analysis_comes_back_from_disk(tmp_path, found):
    _, analysis = found
    analysis.save(tmp_path / "a.safetensors")
    again = Analysis.load(tmp_path / "a.safetensors")
    assert (again.kind, again.role, again.rows) == ("sae", "cond", ROWS)
    assert torch.equal(again.frequency, analysis.frequency)
    assert torch.equal(again.example_rows, analysis.example_rows)


@pytest.mark.parametrize("block", [1, 5, 40])
def test_bounded_examples_do_not_depend_on_the_blocks(block):
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(0, 6, (400,), generator=generator)
    values = torch.randint(0, 9, (400,), generator=generator).float()  # many equal ones
    rows = torch.arange(400) // 4
    best = TopExamples(7, 5)
    for first in range(0, 400, block):
        part = slice(first, first + block)
        best.add(slots[part], values[part], rows[part])
    for slot in range(7):
        own = [(-float(values[i]), i) for i in range(400) if int(slots[i]) == slot]
        wanted = [int(rows[i]) for _, i in sorted(own)[:5]]
        assert [row for row in best.rows[slot].tolist() if row >= 0] == wanted
    assert best.values[6].tolist() == [-np.inf] * 5


def test_area_under_the_curve():
    scores = torch.tensor([[0.1, 1.0], [0.4, 1.0], [0.35, 1.0], [0.8, 1.0]])
    positive = torch.tensor([False, False, True, True])
    assert auroc(scores, positive).tolist() == [0.75, 0.5]
    assert auroc(scores, torch.zeros(4, dtype=torch.bool)).isnan().all()
    with pytest.raises(InputError):
        auroc(scores, torch.ones(3, dtype=torch.bool))


def test_selectivity_names_the_label_and_leaves_out_what_is_not_stated():
    words = ["red", "red", "blue", "blue", ""]
    scores = torch.tensor([[1.0, 0.0, 0.3], [2.0, 0.0, 0.1], [0.0, 0.0, 0.2], [0.0, 0.0, 0.2], [9.0, 0.0, 0.0]])
    found = selectivity(scores, {"colour": words})
    assert found.names == ("colour=blue", "colour=red")
    assert found.live.tolist() == [True, False, True]
    assert found.label(0) == "colour=red"
    assert found.label(1) == found.label(2) == ""
    assert found.share() == 0.5
