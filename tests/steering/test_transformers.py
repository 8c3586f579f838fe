"""A tiny Llama and a tiny T5 encoder of the transformers library, eager, compiled and while generating."""

from typing import Any

import pytest
import torch
from steering_toy import counter
from torch import Tensor

from pysteer.steering import Site, attach

transformers = pytest.importorskip("transformers")

WIDTH = 16


class Add:
    def __init__(self, amount: float = 1.0) -> None:
        self.amount, self.calls = torch.tensor(amount), 0

    def apply(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return x + self.amount

    def to(self, device: torch.device) -> object:
        return self


@pytest.fixture
def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(1, 6)[None]


@pytest.mark.parametrize(
    ("path", "element", "order"),
    [
        ("model.layers.1", 0, "eager"),
        ("model.layers.1.mlp", None, "eager"),
        ("model", "last_hidden_state", "eager"),
        ("model.layers.1.self_attn", 0, "compile first"),
        ("model", 0, "attach first"),
    ],
)
def test_llama(llama: Any, ids: Tensor, path: str, element: int | str | None, order: str) -> None:
    site = Site(path, path, element=element)
    run = llama if order == "eager" else torch.compile(llama, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = llama(ids).logits
        if order == "compile first":
            run(ids)
        add = Add()
        add.amount = torch.linspace(-1, 1, WIDTH)  # a constant would vanish in the norms
        with attach(llama, [(site, add)]):
            eager = llama(ids).logits
            steered = run(ids).logits
            torch.testing.assert_close(steered, eager)
            assert (steered - plain).abs().amax() > 1e-3
        assert torch.equal(llama(ids).logits, plain)
        torch.testing.assert_close(run(ids).logits, plain)


def test_hidden_states_are_the_steered_ones(llama: Any, ids: Tensor) -> None:
    with torch.no_grad():
        plain = llama(ids, output_hidden_states=True).hidden_states
        with attach(llama, [(Site("layer", "model.layers.0", element=0), Add())]):
            steered = llama(ids, output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], plain[0])
    torch.testing.assert_close(steered[1], plain[1] + 1)


def test_generate_with_a_compiled_static_cache(llama: Any, ids: Tensor) -> None:
    backend, graphs = counter()
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    options["disable_compile"] = True  # compile by hand, to count the graphs
    forward = llama.forward
    plain = llama.generate(ids, **options)
    llama.model.compile(fullgraph=True, backend=backend)
    assert torch.equal(llama.generate(ids, **options), plain)
    add = Add(0.0)
    add.amount = torch.zeros(WIDTH)
    with attach(llama, [(Site("layer", "model.layers.1", element=0), add)]):
        assert torch.equal(llama.generate(ids, **options), plain)
        made, outputs = len(graphs), set()
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(5):
                add.amount.copy_(torch.randn(WIDTH) * 20)
                outputs.add(tuple(llama.generate(ids, **options)[0].tolist()))
        assert len(graphs) == made
        assert len(outputs) > 1
    assert torch.equal(llama.generate(ids, **options), plain)
    assert llama.forward == forward


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_layers_keep_checkpointing(llama: Any, ids: Tensor) -> None:
    """transformers wraps `forward` when a subclass is made; a steered layer must still run twice in training."""

    class Scale(Add):
        def apply(self, x: Tensor) -> Tensor:  # keeps a tensor for backward, or the second run would stop before it
            return super().apply(x) * self.amount * 0.9

    llama.train()
    llama.gradient_checkpointing_enable()
    add = Scale()
    with attach(llama, [(Site("layer", "model.layers.1", element=0), add)]):
        llama(ids, labels=ids).loss.backward()
        assert add.calls == 2
    first = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.gradient_checkpointing_disable()
    llama.zero_grad()
    with attach(llama, [(Site("layer", "model.layers.1", element=0), add)]):
        llama(ids, labels=ids).loss.backward()
    assert add.calls == 3
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name])


def test_saving_a_steered_model(llama: Any, ids: Tensor, tmp_path: Any) -> None:
    with torch.no_grad():
        plain = llama(ids).logits
        with attach(llama, [(Site("mlp", "model.layers.1.mlp"), Add())]):
            assert not torch.equal(llama(ids).logits, plain)
            llama.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, plain)


def test_t5_block_returns_a_tuple(ids: Tensor) -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, is_encoder_decoder=False
    )
    encoder = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        plain = encoder(ids, output_hidden_states=True).hidden_states
        with attach(encoder, [(Site("block", "encoder.block.0", element=0), Add())]):
            steered = encoder(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(steered[1], plain[1] + 1)
    assert not torch.allclose(steered[-1], plain[-1])
