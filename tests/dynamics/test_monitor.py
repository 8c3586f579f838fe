"""Statistics of every channel against float64 torch, in every layout, phase and order."""

import itertools

import pytest
import torch
from torch import nn

from pysteer.capture.store import ActivationStore
from pysteer.dynamics import History, Monitor, choose_points
from pysteer.errors import InputError
from pysteer.ops.channel_moments import merge_moments

from .tiny_vae import pictures, tiny_vae


def _watched(module: nn.Module, *inputs: torch.Tensor, **options: object):
    model = nn.Sequential(module)
    with Monitor(model, ["0"], every=1, **options) as monitor:
        for x in inputs:
            model(x)
        (window,) = monitor.step(1)
    return window


def _exact(values: list[torch.Tensor], dim: int, eps: float = 1e-6) -> dict[str, torch.Tensor]:
    x = torch.cat([v.double().movedim(dim, 0).flatten(1) for v in values], 1)
    return {
        "count": torch.full((len(x),), float(x.shape[1])).double(),
        "mean": x.mean(1),
        "std": x.std(1, correction=0),
        "minimum": x.amin(1),
        "maximum": x.amax(1),
        "mean_abs": x.abs().mean(1),
        "near_zero_fraction": (x.abs() < eps).double().mean(1),
        "zero_fraction": (x == 0).double().mean(1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "5d", "3d"])
def test_eight_statistics_equal_float64_torch(dtype, layout):
    shape = {"nchw": (3, 6, 9, 7), "channels_last": (3, 6, 9, 7), "5d": (2, 6, 3, 5, 4), "3d": (3, 6, 31)}[layout]
    inputs = [torch.randn(shape).relu() + torch.arange(6).view(1, 6, *[1] * (len(shape) - 2)) for _ in range(3)]
    inputs = [x.to(dtype) for x in inputs]
    if layout == "channels_last":
        inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    module = nn.Identity()
    model = nn.Sequential(module)
    monitor = Monitor(model, ["0"], every=1)
    monitor._watches[0].point = monitor.points[0].__class__("0", "output", 1, 6)
    with monitor:
        for x in inputs:
            model(x)
        (window,) = monitor.step(1)
    for name, exact in _exact(inputs, 1).items():
        found = window.stat(name)["0.output"]
        if name in ("count", "near_zero_fraction", "zero_fraction", "minimum", "maximum"):
            assert torch.equal(found, exact), name
        else:
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9, msg=name)


def test_channels_of_linear_layers_are_last():
    module, x = nn.Linear(5, 7), torch.randn(4, 3, 5)
    window = _watched(module, x)
    exact = _exact([module(x).detach()], -1)
    torch.testing.assert_close(window.stat("mean")["0.output"], exact["mean"], rtol=1e-6, atol=1e-9)


def test_an_empty_batch_changes_nothing():
    x = torch.randn(2, 4, 3, 3)
    module = nn.GroupNorm(2, 4)
    with_empty = _watched(module, x, x[:0], x)
    without = _watched(module, x, x)
    assert torch.equal(with_empty.moments, without.moments)
    model = nn.Sequential(module)
    with Monitor(model, ["0"], every=1) as monitor:
        model(x[:0])
        assert monitor.step(1) == []


def test_the_order_of_merging_does_not_matter():
    module = nn.GroupNorm(2, 4)
    inputs = [torch.randn(2, 4, 5, 5) * scale for scale in (1, 10, 0.1)]
    windows = [_watched(module, *order).moments for order in itertools.permutations(inputs)]
    parts = [_watched(module, x).moments for x in inputs]
    windows += [merge_moments(merge_moments(*pair), last) for *pair, last in itertools.permutations(parts)]
    for other in windows[1:]:
        torch.testing.assert_close(other, windows[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(other[[0, 3, 4, 6, 7]], windows[0][[0, 3, 4, 6, 7]])


def test_inputs_are_watched_too():
    conv, x = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 4)
    model = nn.Sequential(conv)
    with Monitor(model, {"name": "0", "capture_point": "input"}, every=1) as monitor:
        model(x)
        (window,) = monitor.step(1)
    torch.testing.assert_close(window.stat("mean")["0.input"], x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-9)


def test_the_model_gives_the_same_bits_and_gradients_while_watched():
    images, results = pictures(), []
    for watched in (False, True):
        model = tiny_vae()
        monitor = Monitor(model, "all", every=1)
        if watched:
            monitor.attach()
        loss = (model.decode(model.encode(images).latent_dist.mode()).sample - images).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert bool(monitor.step(1)) == watched
        monitor.detach()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_validation_has_a_window_of_its_own():
    model = nn.Sequential(nn.GroupNorm(2, 4))
    train, held = torch.randn(2, 4, 3, 3), torch.randn(5, 4, 3, 3)
    with Monitor(model, ["0"], every=1) as monitor:
        model(train)
        model.eval()(held)
        with monitor.phase("train"):
            model(train)
        with monitor.paused():
            model(train)
        first, second = monitor.step(1)
    assert (first.phase, second.phase) == ("train", "validation")
    assert first.stat("count")["0.output"].tolist() == [2 * 2 * 9] * 4
    assert second.stat("count")["0.output"].tolist() == [5 * 9] * 4


@pytest.mark.parametrize(("window", "passes"), [("all", 3), ("last", 1)])
def test_a_window_takes_all_forward_passes_or_those_of_its_last_step(window, passes):
    model = nn.Sequential(nn.GroupNorm(2, 4))
    with Monitor(model, ["0"], every=3, window=window) as monitor:
        counts = []
        for step in range(1, 7):
            model(torch.randn(1, 4, 2, 2))
            counts += [w.stat("count")["0.output"][0].item() for w in monitor.step(step)]
    assert counts == [passes * 4, passes * 4]


def test_gradient_checkpointing_counts_a_forward_pass_once():
    model, images = tiny_vae(), pictures()
    counts = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train()
        with Monitor(model, "norm", every=1) as monitor:
            model.decode(model.encode(images).latent_dist.mode()).sample.square().mean().backward()
            (window,) = monitor.step(1)
        counts.append(window.moments)
    assert torch.equal(counts[0], counts[1])


def test_a_state_is_taken_up_in_the_middle_of_a_window():
    model = nn.Sequential(nn.GroupNorm(2, 4))
    inputs = [torch.randn(1, 4, 3, 3) for _ in range(4)]
    whole, first, second = (Monitor(model, ["0"], every=4) for _ in range(3))
    with whole:
        for x in inputs:
            model(x)
        (expected,) = whole.step(4)
    with first:
        for x in inputs[:2]:
            model(x)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    with second:
        for x in inputs[2:]:
            model(x)
        (found,) = second.step(4)
    assert torch.equal(found.moments, expected.moments)


def test_the_history_is_read_back_and_rewound(tmp_path):
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1))
    kept = {}
    for folder in (None, tmp_path / "history"):
        torch.manual_seed(3)
        with Monitor(model, "all", every=1, folder=folder) as monitor:
            for step in range(1, 6):
                model(torch.randn(2, 4, 3, 3))
                monitor.step(step)
                if step == 3:
                    monitor.history.flush()
        kept[folder] = monitor.history
    memory, disk = kept.values()
    assert len(disk) == len(memory) == 5
    for a, b in zip(memory.windows("train"), History(tmp_path / "history").windows(), strict=True):
        assert (a.step, a.phase, list(a.names)) == (b.step, b.phase, list(b.names))
        assert torch.equal(a.moments, b.moments)
    steps, values = disk.series("1.output", "mean_abs")
    assert steps == [1, 2, 3, 4, 5]
    assert values.shape == (5, 3)
    store = ActivationStore.open(tmp_path / "history")
    assert store.complete
    assert store.tokens("0.output").shape == (5 * 8, 4)
    again = History(tmp_path / "history")
    again.rewind(3)
    assert [window.step for window in again.windows()] == [1, 2, 3]
    again.add(list(memory.windows())[3])
    assert [window.step for window in again.windows()] == [1, 2, 3, 4]


def test_rows_of_the_activity_table():
    model = nn.Sequential(nn.GroupNorm(2, 4))
    x = torch.randn(3, 4, 2, 2)
    metrics = ["mean_abs_activation_per_channel", "mean_activation", "std_activation", "full_activation_map"]
    with Monitor(model, {"name": "0", "metrics": metrics}, every=2, map_samples=1) as monitor:
        y = model(x).detach()
        (window,) = monitor.step(2)
    rows = {
        (row["original_metric_name"], row["metric_type"]): row["metric_value"] for row in window.table(monitor.metrics)
    }
    per_channel = y.abs().mean((0, 2, 3)).double()
    assert rows[metrics[0], "per_channel_overall_mean"] == pytest.approx(per_channel.mean().item(), rel=1e-6)
    assert rows[metrics[0], "per_channel_overall_max"] == pytest.approx(per_channel.max().item(), rel=1e-6)
    assert rows["mean_activation", "scalar"] == pytest.approx(y.mean().item(), abs=1e-7)
    assert rows["std_activation", "scalar"] == pytest.approx(y.std().item(), rel=1e-6)
    assert rows["full_activation_map", "full_map_shape"] == "1x4x2x2"
    assert rows["full_activation_map", "full_map_max"] == pytest.approx(y[:1].max().item())


def test_a_compiled_model_is_watched():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    x = torch.randn(2, 3, 4, 4)
    with Monitor(model, "all", every=1) as monitor:
        compiled = torch.compile(model, backend="eager")
        y = compiled(x)
        (window,) = monitor.step(1)
        compiled(x)
        (again,) = monitor.step(2)
    torch.testing.assert_close(window.stat("mean")["1.output"], y.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
    assert torch.equal(window.stat("count")["1.output"], again.stat("count")["1.output"])


def test_layers_are_chosen_by_kind_class_path_and_pattern():
    model = tiny_vae()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]
    assert [point.path for point in choose_points(model, "GroupNorm")] == norms
    assert [point.path for point in choose_points(model, "norm")] == norms
    both = choose_points(model, "conv+GroupNorm")
    assert {point.path for point in both} > set(norms)
    assert [p.name for p in choose_points(model, "vae.encoder.conv_in")] == ["encoder.conv_in.output"]
    assert [p.name for p in choose_points(model, "encoder.conv_in.input")] == ["encoder.conv_in.input"]
    assert all(p.path.startswith("decoder.") for p in choose_points(model, r"decoder\..*norm\d"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": "encoder.conv_inn"}, "did you mean encoder.conv_in?"),
        ({"stats": ["mean_abss"]}, "did you mean mean_abs?"),
        ({"layers": {"name": "encoder.conv_in", "metrics": ["variance_of_all"]}}, "unknown statistic"),
        ({"layers": {"name": "encoder.conv_in", "capture_point": "middle"}}, "input, output"),
        ({"window": "some"}, "all, last"),
        ({"every": 0}, "from 1"),
        ({"layers": []}, "at least one"),
        ({"layers": "("}, "regular expression"),
    ],
)
def test_what_is_not_there_is_said(arguments, says):
    with pytest.raises(InputError) as caught:
        Monitor(tiny_vae(), **arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
