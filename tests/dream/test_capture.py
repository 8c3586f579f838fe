"""Capture on a tiny pipeline: rows belong to their prompts, means are exact, and work is neither lost nor doubled."""

import pyarrow.parquet as pq
import pytest
import torch
from dreaming import PROMPTS, SEEDS, SETTINGS, SITE, autoencoder, features, generator

from pysteer.capture import Recorder
from pysteer.dream.analysis import analyse
from pysteer.dream.capture import CapturePlan, capture_features, read_blocks
from pysteer.dream.parts import Parts, Share
from pysteer.errors import InputError, PysteerError

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return generator()


@pytest.fixture(scope="module")
def recorded(pipe):
    """Activations [N, S, L, D] of conditional and unconditional rows, one prompt at a time."""
    found = {"cond": [], "uncond": []}
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        for role in found:
            with Recorder(pipe, [SITE], rows=role) as recorder:
                pipe([prompt], seeds=[seed], decode=False, **SETTINGS)
            found[role].append(torch.cat([recorder.get(SITE, step) for step in range(4)]))
    return {role: torch.stack(rows) for role, rows in found.items()}


def plan(**more):
    return CapturePlan(PROMPTS, SEEDS, **{"rows": "both", "top_k": 6, "block": 2, "settings": SETTINGS, **more})


def dense(sae, x):
    """Mean over the tokens of every latent, written out."""
    a = (x - sae.bias) @ sae.encoder.T + sae.encoder_bias
    if sae.takes_k:
        kept = torch.zeros_like(a).scatter(-1, a.topk(sae.k).indices, 1.0)
        return (a.relu() * kept).mean(-2)
    return torch.where(a > sae.threshold, a, 0.0).mean(-2)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_rows_are_those_of_their_prompts_and_means_are_exact(tmp_path, pipe, recorded, activation):
    sae = autoencoder(activation=activation)
    both = [features(pipe), features(pipe, sae)]
    parts = capture_features(pipe, plan(), both, tmp_path / "c")
    assert not torch.allclose(recorded["cond"], recorded["uncond"])
    for role in ("cond", "uncond"):
        truths = {"raw": recorded[role].mean(2), "sae": dense(sae, recorded[role])}
        for kind, truth in truths.items():
            blocks = list(read_blocks(parts, kind, role, ("row", "text", "seed")))
            values = torch.cat([block.tensors["values"] for block in blocks])
            indices = torch.cat([block.tensors["indices"] for block in blocks]).long()
            torch.testing.assert_close(values, truth.gather(2, indices), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, truth.topk(6, dim=2).values, rtol=1e-4, atol=1e-5)
            for name, whole in (("sum", truth.sum(0)), ("max", truth.amax(0)), ("min", truth.amin(0))):
                parts_of = torch.stack([block.tensors[name] for block in blocks])
                joined = {"sum": parts_of.sum(0), "max": parts_of.amax(0), "min": parts_of.amin(0)}[name]
                torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-4)
            rows = [row for block in blocks for row in block.rows]
            assert [(row["row"], row["text"], row["seed"]) for row in rows] == list(zip(range(5), PROMPTS, SEEDS))  # noqa: B905
            assert blocks[0].timesteps.tolist() == pipe.pipe.scheduler.timesteps.float().tolist()


def test_maps_are_the_activations_token_by_token(tmp_path, pipe, recorded):
    for activation in ("topk", "jumprelu"):
        sae = autoencoder(activation=activation)
        both = [features(pipe), features(pipe, sae)]
        parts = capture_features(pipe, plan(maps=True, images=False), both, tmp_path / activation)
        block = next(iter(read_blocks(parts, "sae", "cond")))
        maps = block.tensors["maps"].float()
        assert maps.shape == (2, 4, 6, 64)
        torch.testing.assert_close(maps.mean(3), block.tensors["values"], rtol=2e-3, atol=2e-3)
        raw = next(iter(read_blocks(parts, "raw", "cond"))).tensors
        channel = int(raw["indices"][1, 2, 0])
        torch.testing.assert_close(
            raw["maps"][1, 2, 0].float(), recorded["cond"][1, 2, :, channel], rtol=2e-3, atol=2e-3
        )


def test_ranks_do_everything_once_whatever_their_number_was_before(tmp_path, pipe):
    sae = autoencoder()
    whole = capture_features(pipe, plan(block=1), [features(pipe, sae)], tmp_path / "whole")
    capture_features(pipe, plan(block=1), [features(pipe, sae)], tmp_path / "parts", share=Share(1, 3))
    parts = Parts.open(tmp_path / "parts")
    assert parts.done() == {1, 4}
    with pytest.raises(PysteerError, match="3 of 5 items are missing"):
        parts.check_whole()
    ran = []
    for rank in (0, 1):  # two ranks go on where three began
        capture_features(
            pipe, plan(block=1), [features(pipe, sae)], tmp_path / "parts", share=Share(rank, 2), advance=ran.append
        )
    assert sum(ran) == 3
    parts.check_whole()
    assert parts.content() == whole.content()
    assert torch.equal(analyse(parts, "sae", top_k=3).frequency, analyse(whole, "sae", top_k=3).frequency)


def test_one_and_the_same_images_whatever_the_block(tmp_path, pipe):
    found = {}
    for block in (1, 5):
        parts = capture_features(pipe, plan(block=block, rows="cond"), [features(pipe)], tmp_path / str(block))
        paths = [part.files["parquet"] for part in sorted(parts, key=lambda part: part.items)]
        found[block] = [row["png"] for path in paths for row in pq.read_table(path).to_pylist()]
    assert found[1] == found[5]
    assert len(set(found[1])) == 5


def test_another_capture_and_what_cannot_be_captured(tmp_path, pipe):
    capture_features(pipe, plan(), [features(pipe)], tmp_path / "c")
    with pytest.raises(InputError, match="other work"):
        capture_features(pipe, plan(top_k=5), [features(pipe)], tmp_path / "c")
    with pytest.raises(InputError, match="one site"):
        capture_features(pipe, plan(), [features(pipe), features(pipe, site="resnet.0")], tmp_path / "d")
    with pytest.raises(InputError, match="sae cond"):
        list(read_blocks(Parts.open(tmp_path / "c"), "sae", "cond"))
    with pytest.raises(InputError, match="cond, uncond, both"):
        plan(rows="all")
    with pytest.raises(InputError, match="rank < world"):
        Share(2, 2)
    unguided = plan(rows="uncond", settings={**SETTINGS, "guidance_scale": 1.0})
    with pytest.raises(PysteerError, match="never ran with uncond rows"):
        capture_features(pipe, unguided, [features(pipe)], tmp_path / "e")


def test_a_part_counts_once_its_marker_is_there(tmp_path):
    parts = Parts(tmp_path / "p", {"a": 1}, 3)
    parts.add([0, 2], {"txt": lambda path: path.write_text("x")})
    assert parts.left() == [1]
    (tmp_path / "p" / "part-000001-abcdef.txt").write_text("half of a part that was never finished")
    assert Parts.open(tmp_path / "p").left(Share(1, 2)) == [1]
    before = parts.content()
    parts.add([1], {"txt": lambda path: path.write_text("y")})
    assert parts.content() != before
    parts.check_whole()
    parts.add([1, 2], {"txt": lambda path: path.write_text("y")})
    with pytest.raises(PysteerError, match="2 are there twice"):
        parts.check_whole()
