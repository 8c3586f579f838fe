"""Infinity: our port, its pipeline with the T5 encoder in front of it, and models made by the published code.

Sites of the transformer (part "visual"), layer i counted from 0:

    sa.i        output of the self-attention, before its AdaLN gate
    ca.i        output of the cross-attention; it is added to the residual stream as it is
    ffn.i       output of the FFN, before its AdaLN gate
    ca_block.i  output of the whole block: the residual stream
    pooled      the pooled text vector `[R, D]` that drives the AdaLN and the first token; computed once, at step 0

Sites of the text encoder (part "text"): `text.block.i`, the output of a T5 block, and `text.output`, the output of the
encoder after its final norm. The visual clock is the index of the scale; the text clock stays 0.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.families.base import Family, OnRows, register
from pysteer.families.per_object import PerObject
from pysteer.families.transformers import text_sites
from pysteer.steering.site import Site

LOCATIONS = ("sa", "ca", "ffn", "ca_block")


def _is_pipeline(obj: Any) -> bool:
    return hasattr(obj, "text_row_listeners") and hasattr(obj, "transformer") and hasattr(obj, "text_encoder")


def _is_port(obj: Any) -> bool:
    return isinstance(obj, nn.Module) and hasattr(obj, "row_listeners") and hasattr(obj, "text_proj_for_sos")


def _is_published(obj: Any) -> bool:
    names = ("unregistered_blocks", "autoregressive_infer_cfg", "text_proj_for_sos")
    return isinstance(obj, nn.Module) and all(hasattr(obj, name) for name in names)


class _Hub:
    """Clock and row layout of a model that reports neither: it is watched while anybody listens."""

    def __init__(self, device: torch.device) -> None:
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.listeners: list[OnRows] = []
        self.restore: Callable[[], None] | None = None

    def listen(self, on_rows: OnRows, watch: Callable[["_Hub"], Callable[[], None]]) -> Callable[[], None]:
        if not self.listeners:
            self.restore = watch(self)
        self.listeners.append(on_rows)

        def disconnect() -> None:
            if on_rows in self.listeners:
                self.listeners.remove(on_rows)
            if not self.listeners and self.restore is not None:
                self.restore()
                self.restore = None

        return disconnect

    def tell(self, part: str, cond: int, uncond: int, lengths: Tensor | None) -> None:
        for listener in list(self.listeners):
            listener(part, cond, uncond, lengths)


class InfinityFamily(Family):
    """Takes an `InfinityPipeline` (both parts), or a transformer of the port or of the published code (visual). A T5
    encoder on its own is a model of the family `transformers`, where it has the same names."""

    name = "infinity"

    def __init__(self) -> None:
        self._hubs: PerObject[_Hub] = PerObject("infinity_hub")

    def matches(self, obj: Any) -> bool:
        return _is_pipeline(obj) or _is_port(obj) or _is_published(obj)

    def parts(self, obj: Any) -> tuple[str, ...]:
        """The parts that `obj` has."""
        return ("visual", "text") if _is_pipeline(obj) else ("visual",)

    def root(self, obj: Any, part: str) -> nn.Module:
        if part not in self.parts(obj):
            raise InputError(f"part of {type(obj).__name__}", value=part, allowed=", ".join(self.parts(obj)))
        if _is_pipeline(obj):
            return obj.transformer if part == "visual" else obj.text_encoder
        return obj

    def sites(self, obj: Any) -> dict[str, Site]:
        found: dict[str, Site] = {}
        if "visual" in self.parts(obj):
            found.update(_visual_sites(self.root(obj, "visual")))
        if "text" in self.parts(obj):
            found.update(text_sites(self.root(obj, "text")))
        return found

    def layers(self, obj: Any) -> int:
        """The number of transformer blocks."""
        return len(_blocks(self.root(obj, "visual")))

    def text_layers(self, obj: Any) -> int:
        """The number of blocks of the text encoder."""
        encoder: Any = self.root(obj, "text")
        return len(encoder.encoder.block)

    def steps(self, obj: Any, part: str) -> int:
        root: Any = self.root(obj, part)
        if part == "text":
            return 1
        return len(root.schedule) if _is_port(root) else root.lvl_embed.num_embeddings

    def clock(self, obj: Any, part: str) -> Tensor:
        root: Any = self.root(obj, part)
        if part == "visual" and _is_port(root):
            return root.clock
        if part == "text":
            return obj.text_clock
        hub = self._hub(root)
        hub.clock = hub.clock.to(_device(root))
        return hub.clock

    def connect(self, obj: Any, on_rows: OnRows) -> Callable[[], None]:
        undo = [self._connect_part(obj, part, on_rows) for part in self.parts(obj)]

        def disconnect() -> None:
            for each in undo:
                each()

        return disconnect

    def _connect_part(self, obj: Any, part: str, on_rows: OnRows) -> Callable[[], None]:
        root: Any = self.root(obj, part)
        if part == "visual":
            if _is_port(root):
                return _subscribe(root.row_listeners, on_rows)
            return self._hub(root).listen(on_rows, lambda hub: _watch_published(root, hub))
        return _subscribe(obj.text_row_listeners, on_rows)

    def _hub(self, root: nn.Module) -> _Hub:
        return self._hubs.get(root, lambda: _Hub(_device(root)))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _subscribe(listeners: list[OnRows], on_rows: OnRows) -> Callable[[], None]:
    listeners.append(on_rows)

    def disconnect() -> None:
        if on_rows in listeners:
            listeners.remove(on_rows)

    return disconnect


def _blocks(transformer: Any) -> list[nn.Module]:
    return list(getattr(transformer, "unregistered_blocks", None) or transformer.blocks)


def _visual_sites(transformer: Any) -> dict[str, Site]:
    paths = {id(module): path for path, module in transformer.named_modules()}
    width = int(transformer.pos_start.shape[-1])
    found = {}
    for location in LOCATIONS:
        for i, block in enumerate(_blocks(transformer)):
            path = paths[id(block)] + ("" if location == "ca_block" else f".{location}")
            found[f"{location}.{i}"] = Site(f"{location}.{i}", path, width=width)
    found["pooled"] = Site("pooled", "text_proj_for_sos", layout="rows", width=width)
    return found


def _watch_published(model: nn.Module, hub: _Hub) -> Callable[[], None]:
    """Learn rows from the arguments of `autoregressive_infer_cfg` and the scale from those of the first block."""
    name = "autoregressive_infer_cfg"
    original = getattr(model, name)
    before = model.__dict__.get(name)
    signature = inspect.signature(getattr(type(model), name))  # of the class: a wrapper on the instance may hide it

    def watched(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        batch = int(bound.arguments["B"])
        guided = any(factor != 1 for factor in bound.arguments["cfg_list"])
        hub.clock.zero_()
        hub.tell("visual", batch, batch if guided else 0, None)
        return original(*args, **kwargs)

    def follow_scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("scale_ind"), int):
            hub.clock.fill_(kwargs["scale_ind"])

    model.__dict__[name] = watched
    hook = _blocks(model)[0].register_forward_pre_hook(follow_scale, with_kwargs=True)

    def restore() -> None:
        hook.remove()
        if model.__dict__.get(name) is watched:  # somebody's later wrapper keeps calling us; we then only pass on
            if before is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = before

    return restore


register(InfinityFamily())
