"""Models of the transformers library: decoder language models, and text encoders such as CLIP and T5.

Every module whose output is an activation is a site under its path in the model (`model.layers.3.input_layernorm`), so
regular expressions over module names work as they do elsewhere. The usual places also have short names, layer i counted
from 0:

    embed    output of the token embedding
    attn.i   output of the attention of block i, before the residual
    mlp.i    output of the MLP of block i, before the residual
    block.i  output of block i: the residual stream
    norm     output of the last norm

All sites are in the part "text". Rows are the rows of the batch. Tokens that an attention mask leaves out are never
steered. A language model has two steps, 0 for reading a prompt and 1 for every further token of a generation (a run
over one token with a cache); an encoder has one.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.families.base import Family, OnRows, register
from pysteer.families.per_object import PerObject
from pysteer.steering.site import Site

_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "layer.0.SelfAttention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "layer.1.DenseReluDense", "layer.1")
_LAST_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_CACHES = ("past_key_values", "cache")  # the argument before transformers 5.24 and since
_WIDTHS = ("out_features", "embedding_dim", "nf")  # of Linear (also quantised ones), Embedding, GPT-2's Conv1D


def model_of(obj: Any) -> Any:
    """The transformers model in `obj`: itself, what torch.compile wraps, or the model of a `LanguageModel`."""
    if isinstance(getattr(obj, "_orig_mod", None), nn.Module):
        return model_of(obj._orig_mod)
    inner = getattr(obj, "model", None)
    return model_of(inner) if hasattr(obj, "read") and hasattr(obj, "tokenizer") and inner is not None else obj


class _Hub:
    """Clock and listeners of one model."""

    def __init__(self, root: nn.Module) -> None:
        self.clock = torch.zeros((), dtype=torch.int64, device=_device(root))
        self.reads_cache = _reads_cache(root)
        self.listeners: list[OnRows] = []
        self.hook: Any = None


class TransformersFamily(Family):
    """Takes a `PreTrainedModel` (compiled or not) or a `pysteer.models.language.LanguageModel`."""

    name = "transformers"
    capacity = 64
    announced = False

    def __init__(self) -> None:
        self._hubs: PerObject[_Hub] = PerObject("transformers_hub")

    def matches(self, obj: Any) -> bool:
        model = model_of(obj)
        return isinstance(model, nn.Module) and any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)

    def sites(self, obj: Any) -> dict[str, Site]:
        model = self.root(obj, "text")
        short = _short_names(model)
        found = {name: Site(name, path, "text", 0, width=width) for name, (path, width) in short.items()}
        for path, module in model.named_modules():
            width = _width(module)
            if path and width:
                found.setdefault(path, Site(path, path, "text", 0, width=width))
        for name, (path, width) in short.items():
            if path != name:
                found.setdefault(path, Site(path, path, "text", 0, width=width))
        return found | text_sites(model)

    def root(self, obj: Any, part: str) -> nn.Module:
        model: nn.Module = model_of(obj)
        config: Any = model.config
        if part != "text":
            raise InputError(f"part of {type(model).__name__}", value=part, allowed="text")
        if getattr(config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
            raise InputError(
                "encoder-decoder model", value=type(model).__name__, allowed="an encoder or a decoder", fix="pass one"
            )
        return model

    def steps(self, obj: Any, part: str) -> int:
        return 2 if self._hub(self.root(obj, part)).reads_cache else 1

    def lasting(self, obj: Any, part: str) -> bool:
        return True

    def clock(self, obj: Any, part: str) -> Tensor:
        root = self.root(obj, part)
        hub = self._hub(root)
        hub.clock = hub.clock.to(_device(root))
        return hub.clock

    def connect(self, obj: Any, on_rows: OnRows) -> Callable[[], None]:
        root = self.root(obj, "text")
        hub = self._hub(root)
        if not hub.listeners:
            watched = _watched(root)
            hub.hook = watched.register_forward_pre_hook(_watch(watched, hub), with_kwargs=True)
        hub.listeners.append(on_rows)

        def disconnect() -> None:
            if on_rows in hub.listeners:
                hub.listeners.remove(on_rows)
            if not hub.listeners and hub.hook is not None:
                hub.hook.remove()
                hub.hook = None

        return disconnect

    def _hub(self, root: nn.Module) -> _Hub:
        return self._hubs.get(root, lambda: _Hub(root))


def text_sites(encoder: Any) -> dict[str, Site]:
    """The names that T5 encoders have in front of an image generator: `text.block.i` and `text.output`."""
    stack: Any = getattr(encoder, "encoder", None)
    if not hasattr(stack, "block") or not hasattr(stack, "final_layer_norm"):
        return {}
    width = int(encoder.config.d_model)
    names = {f"text.block.{i}": f"encoder.block.{i}" for i in range(len(stack.block))}
    found = {name: Site(name, path, part="text", element=0, width=width) for name, path in names.items()}
    return found | {"text.output": Site("text.output", "encoder.final_layer_norm", part="text", width=width)}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _reads_cache(model: nn.Module) -> bool:
    arguments = inspect.signature(type(model).forward).parameters
    return any(name in arguments for name in _CACHES) or bool(getattr(model, "can_generate", bool)())


def _text_config(model: Any) -> Any:
    get = getattr(model.config, "get_text_config", None)
    return get() if get is not None else model.config


def _hidden(model: Any) -> int:
    config = _text_config(model)
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 0


def _width(module: nn.Module) -> int:
    """Width of the module's output where the module itself says so: linear layers, embeddings, norms."""
    for name in _WIDTHS:
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.shape[0]
    return 0


def _blocks(model: Any) -> tuple[str, Any]:
    """Path and modules of the stack of blocks."""
    config = _text_config(model)
    count = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    return "", ()


def _inside(block: nn.Module, names: tuple[str, ...]) -> str:
    for name in names:
        try:
            block.get_submodule(name)
        except AttributeError:
            continue
        return name
    return ""


def _short_names(model: Any) -> dict[str, tuple[str, int]]:
    """Short name -> (module path, width), in the order of execution."""
    width = _hidden(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, tuple[str, int]] = {}
    stem, blocks = _blocks(model)
    owner = model.get_submodule(stem.rpartition(".")[0])
    embedding = getattr(owner, "embed_tokens", None) or model.get_input_embeddings()  # T5 has a shared one beside it
    if embedding is not None and id(embedding) in paths:
        found["embed"] = (paths[id(embedding)], _width(embedding))
    for i, block in enumerate(blocks):
        for name, candidates in (("attn", _ATTENTION), ("mlp", _MLP)):
            inside = _inside(block, candidates)
            if inside:
                found[f"{name}.{i}"] = (f"{stem}.{i}.{inside}", width)
        found[f"block.{i}"] = (f"{stem}.{i}", width)
    last = _last_norm(model, stem.rpartition(".")[0])
    if last:
        found["norm"] = (last, width)
    return found


def _last_norm(model: nn.Module, owner: str) -> str:
    """Path of the norm behind the blocks: beside them, or (CLIP) beside the module that holds them."""
    for path in dict.fromkeys((owner, owner.rpartition(".")[0])):
        for name in _LAST_NORMS:
            if isinstance(getattr(model.get_submodule(path), name, None), nn.Module):
                return ".".join(filter(None, (path, name)))
    return ""


def _watched(root: nn.Module) -> nn.Module:
    """The module whose calls are runs: the model without its head, which may be called by itself for hidden states."""
    base = getattr(root, "base_model", root)
    _, blocks = _blocks(root)
    inside = isinstance(base, nn.Module) and any(module is blocks for module in base.modules())
    return base if inside else root


def _watch(watched: nn.Module, hub: _Hub) -> Callable[..., None]:
    """A pre-hook that sets the clock and passes on which tokens count; in a compiled graph it is tensor code alone."""
    names = list(inspect.signature(type(watched).forward).parameters)[1:]
    first = names[0]
    cached = hub.reads_cache

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        given = named.get(first)
        if given is None:
            given = named.get("inputs_embeds")
        if given is None:
            return
        rows, tokens = given.shape[0], given.shape[1]
        further = cached and tokens == 1 and any(_holds_tokens(named.get(name)) for name in _CACHES)
        mask = named.get("attention_mask")
        spans = None if further else attended(mask, rows, tokens, given.device)
        hub.clock.fill_(int(further))
        for listener in hub.listeners:
            if torch.compiler.is_compiling():
                listener.follow("text", spans)  # type: ignore[attr-defined]
            else:
                listener("text", rows, 0, spans)

    return watch


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache has read a prompt. Only one that counts in Python is asked: a counter on a device would wait."""
    count = getattr(cache, "get_seq_length", None)
    if count is None or torch.compiler.is_compiling():
        return cache is not None
    length = count()
    return isinstance(length, Tensor) or length > 0


def attended(mask: Any, rows: int, tokens: int, device: torch.device) -> Tensor:
    """First token that counts of every row and the one behind the last, int32 `[R, 2]`, padding on either side."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
        edges = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        edges[:, 1] = tokens
        return edges
    counts = mask[:, -tokens:] != 0
    place = torch.arange(tokens, device=mask.device, dtype=torch.int32)
    start = torch.where(counts, place, tokens).amin(1)
    end = torch.where(counts, place + 1, 0).amax(1)
    return torch.stack((torch.minimum(start, end), end), dim=1).to(torch.int32)


register(TransformersFamily())
