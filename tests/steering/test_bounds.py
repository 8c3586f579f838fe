"""Optional banks and options of an op through a plan: Linear-AcT with its support, on tokens and on maps."""

from typing import Any

import pytest
import torch
from steering_toy import STEPS, WIDTH, FeedForward, Toy
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.families import Family, base
from pysteer.steering import Plan, Site, SiteParameters, steer


def transport(site: str, low: Tensor, high: Tensor, **options: Any) -> SiteParameters:
    sets = len(low)
    banks = {"gain": torch.full((sets, WIDTH), 0.5), "bias": torch.full((sets, WIDTH), 2.0), "low": low, "high": high}
    return SiteParameters(site, "affine_shift", None if sets == 1 else tuple(range(sets)), banks, dict(options))


@pytest.mark.parametrize("compiled", [False, True])
def test_only_values_within_the_bounds_are_changed(model: Toy, compiled: bool) -> None:
    x = torch.randn(4, STEPS, WIDTH)
    plain = model.run(x)
    low, high = torch.full((1, WIDTH), -0.3), torch.full((1, WIDTH), torch.inf)
    low[0, 0] = -torch.inf
    last = len(model.blocks) - 1
    with steer(model, Plan.build([transport(f"block.{last}", low, high)], rows="both")):
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else None
        steered = model.run(x, model=forward)
    for before, after in zip(plain, steered, strict=True):
        inside = (before > low) & (before < high)
        assert inside.any()
        assert not inside.all()
        torch.testing.assert_close(after, torch.where(inside, 0.5 * before + 2.0, before))
        assert torch.equal(after[~inside], before[~inside])
    assert all(torch.equal(a, b) for a, b in zip(model.run(x), plain, strict=True))


def test_bounds_of_each_step(model: Toy) -> None:
    x = torch.randn(2, STEPS, WIDTH)
    plain = model.run(x)
    low = torch.full((STEPS, WIDTH), -torch.inf)
    high = torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf])[:, None].expand(-1, WIDTH).clone()
    with steer(model, Plan.build([transport("ffn.0", low, high)], rows="both")):
        steered = model.run(x)
    assert [torch.equal(a, b) for a, b in zip(plain, steered, strict=True)] == [False, True, False, True]


class Maps(nn.Module):
    """One site whose output is [R, D, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x.movedim(1, -1)).movedim(-1, 1)


class MapFamily(Family):
    name = "maps"
    clock_of_maps = torch.zeros((), dtype=torch.int64)

    def matches(self, obj: Any) -> bool:
        return isinstance(obj, Maps)

    def sites(self, obj: Maps) -> dict[str, Site]:
        return {"all": Site("all", "", layout="channels", width=WIDTH)}

    def root(self, obj: Maps, part: str) -> nn.Module:
        return obj

    def steps(self, obj: Maps, part: str) -> int:
        return 1

    def clock(self, obj: Maps, part: str) -> Tensor:
        return self.clock_of_maps

    def connect(self, obj: Maps, on_rows: Any) -> Any:
        self.announce = on_rows
        return lambda: None


def test_the_mean_of_maps_is_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    family = MapFamily()
    monkeypatch.setattr(base, "_FAMILIES", [family])
    model, x = Maps(), torch.randn(2, WIDTH, 3, 4)
    plain = model(x)
    low, high = torch.full((1, WIDTH), -0.05), torch.full((1, WIDTH), torch.inf)
    entry = transport("all", low, high, of_mean=True)
    with steer(model, Plan.build([entry])):
        family.announce("visual", 2, 0, None)
        steered = model(x)
    mean = plain.mean((2, 3), keepdim=True)
    inside = mean > -0.05
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(steered, plain + inside * (-0.5 * mean + 2.0))


def test_bounds_that_do_not_fit(model: Toy) -> None:
    good = torch.zeros(1, WIDTH)
    alone = transport("ffn.0", good, good)
    del alone.tensors["high"]
    with pytest.raises(
        InputError, match="tensors: got 'bias, gain, low'; allowed: gain, bias, and if wanted low, high"
    ):
        steer(model, Plan.build([alone]))
    with pytest.raises(InputError, match="high: got 'NaN or infinity'"):
        steer(model, Plan.build([transport("ffn.0", good, good * torch.nan)]))
    narrow = Plan.build([transport("ffn.0", good[:, :7], good[:, :7])])
    with pytest.raises(InputError, match=r"width 8\) do not fit"), steer(model, narrow):
        pass


def test_an_update_keeps_the_banks(model: Toy) -> None:
    bound = torch.zeros(1, WIDTH)
    entry = transport("ffn.0", bound, bound + 1)
    free = transport("ffn.0", bound, bound + 1)
    del free.tensors["low"], free.tensors["high"]
    with steer(model, Plan.build([entry])) as handle:
        with pytest.raises(InputError, match=r"tensors: got 'bias, gain'; allowed: bias, gain, high, low"):
            handle.update(Plan.build([free]))
        model.run(torch.randn(2, STEPS, WIDTH))
