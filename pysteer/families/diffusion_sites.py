"""Where the sites of a diffusers model are: told from module and class names, without importing diffusers.

Every module whose output is an activation is a site under its path. `names` adds the short ones in the order of
execution; `pysteer.families.diffusers` says what they mean.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from pysteer.steering.site import Site

_STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
_ATTENTION = ("attn1", "attn", "self_attn", "attention")
_FEED_FORWARD = ("ff", "ffn", "img_mlp", "mlp", "feed_forward")
_CONTEXT_FEED_FORWARD = ("ff_context", "txt_mlp")
_TIMES = ("time_embedding", "time_text_embed", "adaln_single.emb.timestep_embedder", "time_embed.emb.timestep_embedder")
# Modules of these names or classes return a vector per row: embeddings of the timestep and what is made of them.
_PER_ROW_NAMES = ("time_emb_proj", "img_mod", "txt_mod")
_PER_ROW_CLASSES = re.compile("Timestep|TimeText|AdaLayerNorm|Modulation$|AdaGroupNorm")


class Output(NamedTuple):
    """What a module returns that can be steered; see `Site`."""

    layout: str
    width: int
    element: int | None = None


class Streams(NamedTuple):
    """Which element of the output of a transformer block holds which tokens; None where it returns one tensor."""

    image: int | None
    context: int | None


@cache
def streams(block: type[nn.Module]) -> Streams:
    """Read from the code of a block which of the tuples (text, image) and (image, text) it returns.

    Blocks with two streams name what they return `hidden_states` and `encoder_hidden_states`, in either order.
    """
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(block.forward)))
    except (OSError, TypeError):
        return Streams(None, None)
    values = [node.value for node in ast.walk(code) if isinstance(node, ast.Return)]
    for value in values:
        if not isinstance(value, ast.Tuple):
            return Streams(None, None)
    found = [[item.id if isinstance(item, ast.Name) else "" for item in value.elts] for value in values]  # type: ignore
    if not found or "hidden_states" not in found[0] or any(other != found[0] for other in found):
        return Streams(None, None)
    names = found[0]
    context = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None
    return Streams(names.index("hidden_states"), context)


def _number(module: Any, *names: str) -> int:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def _last_width(module: nn.Module) -> int:
    """Width of the last linear layer inside."""
    widths = [_number(inner, "out_features") for _, inner in _visible(module)]
    return next((width for width in reversed(widths) if width), 0)


def _feed_forward_width(module: Any) -> int:
    """That of the layer which leads back; gated ones (w1, w2, w3) do not list it last."""
    for name in ("linear_2", "w2"):
        if _number(getattr(module, name, None), "out_features"):
            return _number(getattr(module, name), "out_features")
    return _last_width(module)


def _norm_width(module: Any) -> int:
    inner = getattr(module, "norm", module)
    for name in ("normalized_shape", "dim"):
        shape = getattr(inner, name, None)
        if shape is not None:
            return int(shape if isinstance(shape, int) else shape[-1])
    weight = getattr(inner, "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 1 else 0


def _attention_width(module: Any) -> int:
    last = getattr(module, "to_out", None)
    last = last[0] if isinstance(last, (nn.ModuleList, nn.Sequential)) and len(last) else last
    return _number(last, "out_features") or _number(module, "inner_dim", "out_dim", "query_dim")


def _block_width(block: Any) -> int:
    for name in _ATTENTION:
        if isinstance(getattr(block, name, None), nn.Module):
            return _attention_width(getattr(block, name))
    return 0


def output_of(module: Any, name: str, per_row: bool = False) -> Output | None:
    """What can be steered of a module's output, None for what is no activation.

    Args:
        module: the module.
        name: its name in the module around it.
        per_row: whether a module around it works on a vector per row.
    """
    kind = type(module).__name__
    module = getattr(module, "base_layer", module)  # a LoRA layer gives what the layer inside gives
    per_row = per_row or name in _PER_ROW_NAMES or bool(_PER_ROW_CLASSES.search(kind))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Output("channels", module.out_channels)
    if isinstance(module, nn.GroupNorm):
        return Output("channels", module.num_channels)
    if _number(module, "out_features"):
        return Output("rows" if per_row else "tokens", _number(module, "out_features"))
    if kind.endswith(("TimestepEmbedding", "ProjEmbeddings")):
        return Output("rows", _last_width(module))
    if kind.endswith("GLUMBConv"):
        return Output("channels", module.conv_point.out_channels)
    if kind.startswith(("ResnetBlock", "Downsample2D", "Upsample2D")):
        return Output("channels", _number(module, "out_channels"))
    if kind == "Transformer2DModel":
        return Output("channels", _number(module, "in_channels"), 0)
    if hasattr(module, "to_q") and hasattr(module, "heads"):
        maps = getattr(module, "group_norm", None) is not None and getattr(module, "residual_connection", False)
        return Output("channels" if maps else "tokens", _attention_width(module), 0)
    if kind.endswith("FeedForward"):
        return Output("tokens", _feed_forward_width(module))
    if "Norm" in kind and _norm_width(module):
        return Output("tokens", _norm_width(module), 0)
    if kind.endswith("Block") and _block_width(module):
        return Output("tokens", _block_width(module), streams(module.__class__).image)
    return None


def _visible(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with their paths, but not what is inside a LoRA layer: only the layer as a whole is called."""
    hidden: tuple[str, ...] = ()
    for path, module in root.named_modules():
        if hidden and path.startswith(hidden):
            continue
        if hasattr(module, "base_layer"):
            hidden = (*hidden, f"{path}.")
        yield path, module


def path_sites(root: nn.Module, part: str, prefix: str = "") -> dict[str, Site]:
    """All sites of `root` under their paths; `path:k` for both streams of a block that returns two."""
    per_row: set[str] = set()
    found: dict[str, Site] = {}
    for path, module in _visible(root):
        owner, _, name = path.rpartition(".")
        if owner in per_row or _PER_ROW_CLASSES.search(type(module).__name__) or name in _PER_ROW_NAMES:
            per_row.add(path)
        output = output_of(module, name, owner in per_row)
        if not path or output is None:
            continue
        full = prefix + path
        found[full] = Site(full, path, part, output.element, output.layout, output.width)
        if output.element is not None and streams(module.__class__).context is not None:
            for k in (0, 1) if not getattr(module, "context_pre_only", False) else ():
                found[f"{full}:{k}"] = Site(f"{full}:{k}", path, part, k, output.layout, output.width)
    return found


def _inside(block: Any, names: tuple[str, ...]) -> str:
    return next((name for name in names if isinstance(getattr(block, name, None), nn.Module)), "")


def _named(found: dict[str, Site], name: str, path: str, known: dict[str, Site], element: int | None = None) -> None:
    """Give the site at `path` a short name, for another element of its output if one is given."""
    site = known.get(path)
    if site is not None:
        chosen = site.element if element is None else element
        found[name] = Site(name, site.path, site.part, chosen, site.layout, site.width)


def denoiser_sites(root: Any) -> dict[str, Site]:
    """All sites of a UNet or a diffusion transformer, those with short names first."""
    known = path_sites(root, "visual")
    found: dict[str, Site] = {}
    for path in _TIMES:
        _named(found, "time", path, known)
    found |= unet_names(root, known) if hasattr(root, "down_blocks") else transformer_names(root, known)
    return found | known


def autoencoder_sites(root: Any) -> dict[str, Site]:
    """All sites of an autoencoder, under names that begin with `vae.`."""
    known = path_sites(root, "vae", "vae.")
    found: dict[str, Site] = {}
    for name in ("encoder", "decoder"):
        if isinstance(getattr(root, name, None), nn.Module):
            found |= unet_names(getattr(root, name), known, f"vae.{name}.")
    return found | known


def transformer_names(root: Any, known: dict[str, Site]) -> dict[str, Site]:
    """Short names of a DiT: its stacks of blocks, numbered through."""
    found: dict[str, Site] = {}
    stacks = [name for name in _STACKS if isinstance(getattr(root, name, None), nn.ModuleList)]
    blocks = [(f"{stack}.{i}", block) for stack in stacks for i, block in enumerate(getattr(root, stack))]
    for i, (path, block) in enumerate(blocks):
        attention = _inside(block, _ATTENTION)
        _named(found, f"attn.{i}", f"{path}.{attention}", known)
        both = streams(block.__class__)
        last = i + 1 == len(blocks)  # nobody reads its text, if it returns any
        joint = getattr(getattr(block, attention or "attn", None), "added_kv_proj_dim", None)
        if both.context is not None and not last and joint:
            _named(found, f"context_attn.{i}", f"{path}.{attention}", known, element=1)
        if getattr(getattr(block, "attn2", None), "is_cross_attention", False):
            _named(found, f"ca.{i}", f"{path}.attn2", known)
        _named(found, f"ff.{i}", f"{path}.{_inside(block, _FEED_FORWARD)}", known)
        if not last:
            _named(found, f"context_ff.{i}", f"{path}.{_inside(block, _CONTEXT_FEED_FORWARD)}", known)
        _named(found, f"block.{i}", path, known)
        if both.context is not None and not last:
            _named(found, f"context.{i}", path, known, element=both.context)
    return found


def unet_names(root: Any, known: dict[str, Site], prefix: str = "") -> dict[str, Site]:
    """Short names of a UNet, of an encoder or of a decoder: the way down, the middle, the way up."""
    found: dict[str, Site] = {}
    counts: dict[str, int] = {}

    def number(kind: str, path: str) -> None:
        if prefix + path in known:
            _named(found, f"{prefix}{kind}.{counts.get(kind, 0)}", prefix + path, known)
            counts[kind] = counts.get(kind, 0) + 1

    for path, block in _levels(root):
        for j in range(len(getattr(block, "resnets", ()))):
            attentions = getattr(block, "attentions", ())
            middle = path == "mid_block"
            if not middle or j == 0:
                number("resnet", f"{path}.resnets.{j}")
            if j < len(attentions) and attentions[j] is not None:
                inner = f"{path}.attentions.{j}"
                _number_attention(attentions[j], inner, number)
                short = f"mid.{j}" if middle else f"{path.split('_')[0]}.{path.rpartition('.')[2]}.{j}"
                _named(found, f"{prefix}{short}", prefix + inner, known)
            if middle and j + 1 < len(block.resnets):
                number("resnet", f"{path}.resnets.{j + 1}")
    return found


def _levels(root: Any) -> Iterator[tuple[str, Any]]:
    for i, block in enumerate(getattr(root, "down_blocks", None) or ()):
        yield f"down_blocks.{i}", block
    if getattr(root, "mid_block", None) is not None:
        yield "mid_block", root.mid_block
    for i, block in enumerate(getattr(root, "up_blocks", None) or ()):
        yield f"up_blocks.{i}", block


def _number_attention(module: Any, path: str, number: Any) -> None:
    """The transformer blocks in an attention of a UNet, or the attention itself where it has none."""
    if not hasattr(module, "transformer_blocks"):
        number("attn", path)
        return
    for k in range(len(module.transformer_blocks)):
        for kind, name in (("attn", ".attn1"), ("ca", ".attn2"), ("ff", ".ff"), ("block", "")):
            number(kind, f"{path}.transformer_blocks.{k}{name}")
