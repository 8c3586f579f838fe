"""Which tensor of an output is steered, and modules that would never run are refused."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from steering_toy import WIDTH, FeedForward, Shift
from torch import Tensor, nn

from pysteer.errors import InputError, PysteerError
from pysteer.steering import Site, attach

Pair = namedtuple("Pair", "text image")


class Returns(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(x)


def run(form: Any, element: int | str | None, compiled: bool = False) -> Any:
    module = Returns(form)
    call = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    with attach(module, [(Site("s", "", element=element), Shift())]):
        return call(torch.zeros(1, 1, WIDTH))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("form", "element"),
    [
        (lambda x: x + 0, None),
        (lambda x: x + 0, 0),
        (lambda x: (x + 0, x - 1), 0),
        (lambda x: (x - 1, x + 0), 1),
        (lambda x: (x - 1, x + 0), -1),
        (lambda x: [x - 1, x + 0], 1),
        (lambda x: Pair(x - 1, x + 0), 1),
        (lambda x: {"a": x - 1, "b": x + 0}, "b"),
        (lambda x: {"a": x - 1, "b": x + 0}, 1),
    ],
)
def test_one_element_is_replaced(form: Any, element: Any, compiled: bool) -> None:
    plain, steered = form(torch.zeros(1, 1, WIDTH)), run(form, element, compiled)
    assert type(steered) is type(plain)
    if isinstance(plain, Tensor):
        plain, steered = [plain], [steered]
    keys = plain.keys() if isinstance(plain, dict) else range(len(plain))
    changes = [float((steered[key] - plain[key]).mean()) for key in keys]
    assert sorted(changes) == [0.0] * (len(changes) - 1) + [1.0]
    assert all(float(steered[key].mean()) in (1.0, -1.0) for key in keys)  # the zero became one, the other stayed


def test_model_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    form = lambda x: outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x,))  # noqa: E731
    for element in (0, "last_hidden_state"):
        steered = run(form, element)
        assert isinstance(steered, outputs.BaseModelOutput)
        assert float(steered.last_hidden_state.mean()) == 1.0
        assert float(steered[0].mean()) == 1.0
        assert float(steered.hidden_states[0].mean()) == 0.0


@pytest.mark.parametrize(
    ("form", "element"),
    [
        (lambda x: x + 0, 1),
        (lambda x: (x + 0, x), None),
        (lambda x: (x + 0, x), 2),
        (lambda x: (x + 0, None), 1),
        (lambda x: {"a": x}, "b"),
        (lambda x: {"a": x}, 1),
        (lambda x: None, None),
        (lambda x: 3.0, 0),
    ],
)
def test_outputs_that_do_not_fit(form: Any, element: Any) -> None:
    with pytest.raises(PysteerError, match="steered module returned"):
        run(form, element)


def test_unknown_path_names_the_closest_child() -> None:
    model = nn.Sequential()
    model.encoder = FeedForward()
    with pytest.raises(InputError, match=r"encoders.*allowed: encoder; fix: did you mean encoder"):
        attach(model, {"encoders": Shift()})


def test_nothing_is_attached_when_one_of_several_is_refused() -> None:
    model = nn.Sequential(FeedForward())
    with pytest.raises(InputError):
        attach(model, {"0": Shift(), "1": Shift()})
    assert type(model[0]) is FeedForward
    assert "_steer_fwd" not in model[0].__dict__


def test_traced_modules_are_refused() -> None:
    ffn = FeedForward()
    with pytest.warns(DeprecationWarning, match="trace"):
        scripted = torch.jit.trace(ffn, torch.zeros(1, WIDTH))
    for module in (torch.fx.symbolic_trace(ffn), scripted):
        with pytest.raises(InputError, match="traced or scripted"):
            attach(nn.Sequential(module), {"0": Shift()})


def test_children_that_are_never_called_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).eval()
    x = torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        plain = layer(x)
        for path in ("linear2", "self_attn", "norm1"):
            with pytest.raises(InputError, match=f"never run.*fast path.*{path}"):
                attach(layer, {path: Shift()})
        with pytest.raises(InputError, match=r"never run.*self_attn\.out_proj"):
            attach(layer, {"self_attn.out_proj": Shift()})
        assert torch.equal(layer(x), plain)
        with attach(layer, {"": Shift()}):
            torch.testing.assert_close(layer(x), plain + 1)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with attach(layer, {"norm2": Shift()}):
                torch.testing.assert_close(layer(x), plain + 1)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_fused_projections_are_refused_also_when_fused_later() -> None:
    attention = nn.Module()
    attention.to_q, attention.to_out = FeedForward(), FeedForward()
    attachment = attach(attention, {"to_q": Shift(), "to_out": Shift()})
    attention.fused_projections = True
    with pytest.raises(InputError, match=r"to_q.*never run.*unfuse"):
        attachment.ensure()
    attachment.detach()
    with pytest.raises(InputError, match=r"to_q.*never run.*unfuse"):
        attach(attention, {"to_q": Shift()})
    with attach(attention, {"to_out": Shift()}):
        assert torch.equal(attention.to_out(torch.zeros(1, WIDTH)), torch.ones(1, WIDTH))
