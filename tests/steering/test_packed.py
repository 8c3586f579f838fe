"""All tensors of a table lie in one, and that is what a compiled graph takes."""

from typing import Any

import torch
from steering_toy import LAYERS, STEPS, WIDTH, Toy, plan
from torch import Tensor, fx

from pysteer.steering import Plan, SiteParameters, steer
from pysteer.steering.packed import KINDS, Kind, Pack, known_as


def pack() -> Pack:
    banks: dict[str, Any] = {"scale": ((3, 5), torch.float32), "latent": ((3, 2), torch.int32)}
    return Pack.of(banks)


def test_views_do_not_overlap_and_write_through() -> None:
    made = pack()
    whole = made.empty(4, 7, torch.device("cpu"))
    banks, (slot, strength) = made.banks(whole), made.table(whole, 4)
    every = {**banks, "slot": slot, "strength": strength}
    assert {name: list(each.shape) for name, each in every.items()} == {
        "scale": [3, 5], "latent": [3, 2], "slot": [4, 7], "strength": [4, 7]
    }  # fmt: skip
    assert {name for name, each in every.items() if each.dtype is torch.int32} == {"latent", "slot"}
    for value, each in enumerate(every.values(), 1):
        each.fill_(value)
    for value, each in enumerate(every.values(), 1):
        assert (each == value).all()
    again = {**made.banks(whole), **dict(zip(("slot", "strength"), made.table(whole, 4), strict=True))}
    assert all(torch.equal(again[name], every[name]) for name in every)


def test_banks_begin_where_wide_loads_may() -> None:
    made = pack()
    assert all(piece.begin * 4 % 64 == 0 for piece in made.pieces)
    assert made.pieces[0].end <= made.pieces[1].begin
    assert made.size >= made.pieces[-1].end


def test_equal_kinds_have_one_name() -> None:
    def op(x: Tensor) -> Tensor:
        return x

    first = known_as(Kind(op, pack(), {"k": 2}, "tokens", alone=True, common=False))
    assert first == known_as(Kind(op, pack(), {"k": 2}, "tokens", alone=True, common=False))
    others = [
        Kind(op, pack(), {"k": 3}, "tokens", alone=True, common=False),
        Kind(op, pack(), {"k": 2}, "channels", alone=True, common=False),
        Kind(op, pack(), {"k": 2}, "tokens", alone=False, common=False),
        Kind(op, pack(), {"k": 2}, "tokens", alone=True, common=True),
        Kind(op, Pack.of({}), {"k": 2}, "tokens", alone=True, common=False),
    ]
    assert len({first, *map(known_as, others)}) == 6
    assert KINDS[first].options == {"k": 2}


def inputs_of_graph(model: Toy, x: Tensor) -> int:
    """How many tensors the graph of a run takes."""
    taken: list[int] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        taken.append(sum(node.op == "placeholder" for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model.run(x, 0, torch.compile(model, fullgraph=True, backend=backend, dynamic=False))
    return taken[0]


def test_a_site_costs_a_graph_two_tensors(model: Toy) -> None:
    x = torch.randn(2, STEPS, WIDTH)
    before = inputs_of_graph(model, x)
    banks = {"gain": torch.full((1, WIDTH), 2.0), "bias": torch.ones(1, WIDTH)}
    sites = [SiteParameters(f"ffn.{i}", "affine_shift", None, banks) for i in range(LAYERS)]
    plain = model.run(x)
    with steer(model, Plan.build(sites)) as handle:
        assert inputs_of_graph(model, x) == before + 2 * LAYERS + 1  # the clock is shared
        assert not torch.allclose(model.run(x)[0], plain[0])
        assert all(entry.calls == 2 * STEPS for entry in handle.report())


def test_moved_tables_keep_what_is_in_them(model: Toy) -> None:
    x = torch.randn(2, STEPS, WIDTH)
    with steer(model, plan("block.2")) as handle:
        steered = model.run(x)
        (table,) = handle._parts["visual"].tables
        before = {name: bank.clone() for name, bank in table.bank.items()}
        table.to(torch.device("cpu"))
        assert all(torch.equal(table.bank[name], bank) for name, bank in before.items())
        assert table.slot.untyped_storage().data_ptr() == table.whole.untyped_storage().data_ptr()
        for got, want in zip(model.run(x), steered, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
