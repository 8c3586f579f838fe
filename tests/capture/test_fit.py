"""Fitting from generations: at once, sequentially, with negatives, from texts; saved and loaded."""

import json
from contextlib import nullcontext

import pytest
import torch
from tiny_infinity import TEXT_WIDTH, WIDTH, tiny_pipeline

import pysteer
from pysteer.capture import Fitted, Recorder, fit
from pysteer.errors import InputError
from pysteer.files import read_safetensors, write_safetensors
from pysteer.methods import MeanDifference, Prototype
from pysteer.steering import Plan

BACKGROUNDS = ("black", "white", "gray", "red", "blue")
SOURCE = [f"a {size} circle on a {colour} background" for colour in BACKGROUNDS for size in ("small", "large")]
TARGET = [prompt.replace("circle", "square") for prompt in SOURCE]
OTHERS = [prompt.replace("circle", "star") for prompt in SOURCE[:4]]
METHOD = Prototype(clusters=3)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def same(first, second) -> bool:
    pairs = zip(first.parameters, second.parameters, strict=True)
    return all(a.site == b.site and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors) for a, b in pairs)


def test_at_once_fits_the_recorded_activations(pipe):
    fitted = fit(pipe, METHOD, SOURCE, TARGET, sites=["ca_block", "pooled"], steps=[1, 2], seeds=7)
    assert [(e.site, e.steps) for e in fitted.parameters][:2] == [("pooled", (0,)), ("ca_block.0", (1, 2))]
    seeds = list(range(7, 17))
    with Recorder(pipe, "ca_block") as source:
        pipe(SOURCE, seeds=seeds)
    with Recorder(pipe, "ca_block") as target:
        pipe(TARGET, seeds=seeds)
    for entry in fitted.parameters[1:]:
        for row, step in enumerate((1, 2)):
            by_hand = METHOD.fit_site(source.get(entry.site, step), target.get(entry.site, step))
            for name, tensor in by_hand.tensors.items():
                assert torch.allclose(entry.tensors[name][row], tensor, atol=1e-4)
    batched = fit(pipe, METHOD, SOURCE, TARGET, sites=["ca_block"], steps=[1, 2], seeds=7, batch_size=7)
    for a, b in zip(batched.parameters, fitted.parameters[1:], strict=True):
        assert torch.allclose(a.tensors["delta"], b.tensors["delta"], atol=1e-3)


def test_sequential_is_a_refit_site_by_site_with_the_earlier_edits_active(pipe):
    sites, steps = ["ffn.0", "ca_block.1"], (0, 2)
    method = MeanDifference()
    fitted = fit(pipe, method, SOURCE, TARGET, sites=sites, steps=steps, sequential=True, seeds=3)
    seeds = list(range(3, 13))
    with Recorder(pipe, sites) as target:
        pipe(TARGET, seeds=seeds)
    done: dict[tuple[str, int], torch.Tensor] = {}
    for step in steps:  # the order of execution: steps, and in each the sites
        for site in sites:
            with steering(pipe, refitted(done)), Recorder(pipe, [site]) as source:
                pipe(SOURCE, seeds=seeds)
            x = source.get(site, step)
            done[site, step] = method.fit_site(x, target.get(site, step)).tensors["bias"]
    for entry in fitted.parameters:
        for row, step in enumerate(steps):
            assert torch.allclose(entry.tensors["bias"][row], done[entry.site, step], atol=1e-4)
    alone = fit(pipe, method, SOURCE, TARGET, sites=sites, steps=steps, seeds=3)
    assert torch.allclose(alone.parameters[0].tensors["bias"][0], done["ffn.0", 0], atol=1e-4)
    assert not torch.allclose(alone.parameters[1].tensors["bias"][1], done["ca_block.1", 2], atol=1e-2)


def steering(pipe, plan):
    return pysteer.steer(pipe, plan) if plan.entries else nullcontext()


def refitted(done) -> Plan:
    from pysteer.steering import SiteParameters

    entries = []
    for (site, step), bias in done.items():
        entries.append(
            SiteParameters(site, "affine_shift", (step,), {"gain": torch.ones(1, WIDTH), "bias": bias[None]})
        )
    return Plan.build(entries)


@pytest.mark.parametrize("rows", ["cond", "uncond", "both"])
def test_sequential_steers_the_source_rows_only(pipe, rows):
    settings = {"forced_bits": [b.repeat(2, 1, 1) for b in pipe(SOURCE, seeds=0).bits]}
    with Recorder(pipe, ["ca_block.1"], rows="all") as plain:
        pipe([*SOURCE, *TARGET], seeds=[*range(10)] * 2, **settings)
    with Recorder(pipe, ["ca_block.1"], rows="all") as steered:
        first = fit(
            pipe, METHOD, SOURCE, TARGET, sites=["ca_block.0"], steps=[0], sequential=True, rows=rows, settings=settings
        )
    changed = (steered.get("ca_block.1", 0) != plain.get("ca_block.1", 0)).flatten(1).any(1)
    expected = torch.zeros(40, dtype=torch.bool)
    expected[:10] = rows != "uncond"
    expected[20:30] = rows != "cond"
    assert torch.equal(changed, expected)
    assert first.meta["rows"] == rows
    cond, uncond = first.plan().entries[0].at(0)
    assert (cond, uncond) == (float(rows != "uncond"), float(rows != "cond"))


def test_sequential_includes_the_text_and_feeds_the_image(pipe):
    fitted = fit(pipe, METHOD, SOURCE, TARGET, sites=["text.block.0", "text.output", "ca.1"], sequential=True)
    assert [entry.site for entry in fitted.parameters] == ["text.block.0", "text.output", "ca.1"]
    alone = fit(pipe, METHOD, SOURCE, TARGET, sites=["text.block.0", "text.output", "ca.1"])
    assert torch.equal(fitted.parameters[0].tensors["delta"], alone.parameters[0].tensors["delta"])
    for before, after in zip(alone.parameters[1:], fitted.parameters[1:], strict=True):
        assert float(after.tensors["delta"].norm()) < 0.8 * float(before.tensors["delta"].norm())


def test_text_fit_moves_the_prompt_to_its_pair(pipe):
    fitted = fit(pipe, Prototype(clusters=64), SOURCE, TARGET, sites="text.output")
    assert fitted.parameters[0].tensors["delta"].shape == (1, 64, TEXT_WIDTH)
    target, before = pipe.encode_text(TARGET), pipe.encode_text(SOURCE)
    with pysteer.steer(pipe, fitted.plan()):
        moved = pipe.encode_text(SOURCE)
    valid = before.mask()
    remaining = (moved.hidden - target.hidden)[valid].norm() / (before.hidden - target.hidden)[valid].norm()
    assert remaining < 0.5


def test_negatives_join_and_are_spared(pipe):
    fitted = fit(pipe, Prototype(clusters=64), SOURCE, TARGET, sites="text.output", negatives=OTHERS)
    without = fit(pipe, Prototype(clusters=64), SOURCE, TARGET, sites="text.output")
    plain = pipe.encode_text(OTHERS)

    def change(plan) -> float:
        with pysteer.steer(pipe, plan):
            return float((pipe.encode_text(OTHERS).hidden - plain.hidden).norm())

    assert change(fitted.plan()) < 0.7 * change(without.plan())
    assert fitted.meta["negative_prompts"] == 4
    sequential = fit(pipe, METHOD, SOURCE, TARGET, sites="ca_block", negatives=OTHERS, sequential=True)
    assert sequential.parameters[0].tensors["delta"].abs().max() > 0


def test_unpaired_and_shuffled(pipe):
    paired = fit(pipe, MeanDifference(), SOURCE, TARGET, sites="ca", seeds=1)
    unpaired = fit(pipe, MeanDifference(), SOURCE, TARGET[:7], sites="ca", seeds=1, paired=False)
    assert not same(paired, unpaired)
    shuffled = fit(pipe, MeanDifference(), SOURCE, TARGET, sites="pooled", control="shuffled", fit_seed=2)
    real = fit(pipe, MeanDifference(), SOURCE, TARGET, sites="pooled")
    assert shuffled.meta["control"] == "shuffled"
    assert shuffled.meta["paired"] is False
    direction = real.parameters[0].tensors["bias"][0]
    other = shuffled.parameters[0].tensors["bias"][0]
    assert float(torch.dot(other, direction)) < 0.5 * float(torch.dot(direction, direction))
    again = fit(pipe, MeanDifference(), SOURCE, TARGET, sites="pooled", control="shuffled", fit_seed=2)
    assert same(shuffled, again)


def test_same_seeds_same_parameters(pipe):
    for sequential in (False, True):
        first, second, other = (
            fit(pipe, METHOD, SOURCE, TARGET, sites="ca_block", sequential=sequential, seeds=s) for s in (5, 5, 6)
        )
        assert same(first, second)
        assert not same(first, other)


@pytest.mark.parametrize(
    "method",
    [
        MeanDifference(pooled=True),
        Prototype(clusters=3, distance="mahalanobis"),
        Prototype(clusters=3, direction="diff", weight="soft"),
        Prototype(clusters=3, direction="toward", normalize="unit"),
        Prototype(clusters=3, direction="toward", weight="gate"),
        Prototype(clusters=3, direction="grad", distance="mahalanobis", normalize="input", weight="soft"),
    ],
    ids=lambda method: "-".join(str(value) for value in method.config().values() if isinstance(value, str)) or "mean",
)
@pytest.mark.parametrize("sequential", [False, True])
def test_every_method_is_fitted_saved_and_steers(pipe, tmp_path, method, sequential):
    fitted = fit(pipe, method, SOURCE, TARGET, sites=["text.output", "pooled", "ca_block"], sequential=sequential)
    loaded = Fitted.from_pretrained(fitted.save_pretrained(tmp_path))
    assert same(fitted, loaded)
    before = pipe(SOURCE, seeds=3)
    with pysteer.steer(pipe, loaded.plan()) as handle:
        during = pipe(SOURCE, seeds=3)
        handle.strength = 0.0
        off = pipe(SOURCE, seeds=3)
        assert all(entry.calls for entry in handle.report())
    assert not torch.equal(before.features, during.features)
    assert torch.equal(before.features, off.features)


def test_progress_counts_every_fit(pipe):
    seen = []
    fit(pipe, METHOD, SOURCE, TARGET, sites="ca", steps=[0, 2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_steering_with_the_fit_brings_the_images_to_those_of_the_target(pipe):
    fitted = fit(pipe, Prototype(clusters=64), SOURCE, TARGET, sites="ca_block", sequential=True, seeds=0)
    source, target = pipe(SOURCE, seeds=0), pipe(TARGET, seeds=0)
    with pysteer.steer(pipe, fitted.plan()):
        steered = pipe(SOURCE, seeds=0)
    before = (source.features - target.features).abs().mean()
    after = (steered.features - target.features).abs().mean()
    assert before > 0
    assert after < 0.5 * before


def test_control_keeps_norms_at_every_step(pipe):
    fitted = fit(pipe, METHOD, SOURCE, TARGET, sites="ca_block")
    control = fitted.random_direction(seed=1)
    for a, b in zip(fitted.parameters, control.parameters, strict=True):
        assert a.steps == b.steps
        assert torch.allclose(a.tensors["delta"].norm(dim=-1), b.tensors["delta"].norm(dim=-1), atol=1e-5)
        assert not torch.allclose(a.tensors["delta"], b.tensors["delta"])
    first, second = control.parameters[0].tensors["delta"], control.parameters[1].tensors["delta"]
    assert torch.nn.functional.cosine_similarity(first[0, 0], first[1, 0], dim=0).abs() < 0.9
    assert torch.nn.functional.cosine_similarity(first[0, 0], second[0, 0], dim=0).abs() < 0.9


def test_schedule_and_selection(pipe):
    fitted = fit(pipe, METHOD, SOURCE, TARGET, sites=["ca", "ffn"])
    plan = fitted.plan(schedule={"ca.1": {0: (2.0, 0.5)}})
    assert [entry.parameters.site for entry in plan.entries] == ["ca.1"]
    assert plan.entries[0].at(0) == (2.0, 0.5)
    assert plan.entries[0].at(1) == (0.0, 0.0)
    assert [entry.site for entry in fitted.select(["ffn"]).parameters] == ["ffn.0", "ffn.1", "ffn.2"]
    with pytest.raises(InputError, match="not fitted"):
        fitted.plan(schedule={"sa.1": {0: (1.0, 0.0)}})
    with pytest.raises(InputError, match=r"step of ca\.1"):
        fitted.plan(schedule={"ca.1": {3: (1.0, 0.0)}})
    with pytest.raises(InputError, match=r"did you mean ffn\.1"):
        fitted.select(["ffn1"])


def test_saved_is_loaded(pipe, tmp_path):
    fitted = fit(pipe, Prototype(clusters=5, distance="mahalanobis"), SOURCE, TARGET, sites=["ca", "text.output"])
    loaded = Fitted.from_pretrained(fitted.save_pretrained(tmp_path / "fit"))
    assert same(fitted, loaded)
    assert (loaded.method, loaded.meta) == (fitted.method, fitted.meta)
    assert [(e.steps, e.options, e.op) for e in loaded.parameters] == [
        (e.steps, e.options, e.op) for e in fitted.parameters
    ]
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["config.json", "parameters.safetensors"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ca.0/delta", None, "lack a tensor: got 'ca.0/delta'"),
        ("ca.0/extra", torch.ones(2), "unexpected tensors"),
        ("ca.0/delta", torch.zeros(3, 5, 7), r"shape of ca\.0/delta: got \[3, 5, 7\]; allowed: \[3, 5, 32\]"),
        ("ca.0/weight", torch.zeros(2, 5, 32), r"shape of ca\.0/weight"),
        ("ca.0/delta", torch.full((3, 5, 32), float("nan")), r"values of ca\.0/delta"),
        ("ca.0/delta", torch.full((3, 5, 32), float("-inf")), "infinity"),
        ("ca.0/offset", torch.full((3, 5), float("inf")), r"values of ca\.0/offset"),
        ("ca.0/delta", torch.zeros(3, 5, 32).half(), "dtype of ca"),
    ],
)
def test_damaged_files_are_named(pipe, tmp_path, name, damage, message):
    fitted = fit(pipe, Prototype(clusters=5), SOURCE, TARGET, sites="ca.0")
    fitted.save_pretrained(tmp_path)
    tensors, _ = read_safetensors(tmp_path / "parameters.safetensors", finite=False)
    if damage is None:
        del tensors[name]
    else:
        tensors[name] = damage
    write_safetensors(tmp_path / "parameters.safetensors", tensors)
    with pytest.raises(InputError, match=message):
        Fitted.from_pretrained(tmp_path)


def test_damaged_configuration_is_named(pipe, tmp_path):
    fit(pipe, METHOD, SOURCE, TARGET, sites="ca.0").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"method": "prototypes"}, "did you mean prototype"),
        ({"method_config": {"clusters": -1}}, "1 to 1024"),
        ({"format": "other"}, "allowed: pysteer-fitted-1"),
        ({"sites": 3}, "a list"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            Fitted.from_pretrained(tmp_path)
    weights = tmp_path / "parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="truncated"):
        Fitted.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": "ca_blocks"}, "did you mean ca_block"),
        ({"steps": [3]}, "0 to 2"),
        ({"steps": []}, "at least one"),
        ({"target": TARGET[:3]}, "10 and 3"),
        ({"source": []}, "source prompts"),
        ({"source": "a circle"}, "source prompts"),
        ({"seeds": [1, 2]}, "10 of them"),
        ({"control": "shuffle"}, "did you mean shuffled"),
        ({"rows": "all"}, "cond, uncond, both"),
        ({"batch_size": 0}, "above 0"),
    ],
)
def test_bad_requests_are_named(pipe, change, message):
    request = {"source": SOURCE, "target": TARGET, "sites": "ca", **change}
    with pytest.raises(InputError, match=message):
        fit(pipe, METHOD, request.pop("source"), request.pop("target"), **request)
