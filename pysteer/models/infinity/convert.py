"""Bring published Infinity weights into the folder format of `InfinityPipeline` (safetensors and JSON).

What is read: the `.pth` files of the published models (a plain state dict), training checkpoints (`trainer` with
`gpt_fsdp`, and its moving average), sharded folders with an index (the 8B model), safetensors, and the tokenizer's
`.pth` (`vae` or `ema` inside). Pickles are read with `weights_only=True`: they cannot run code. The configuration is
read off the shapes. A folder appears only when everything in it was checked and written.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.presets import PRESETS
from pysteer.models.infinity.schedule import scale_schedule
from pysteer.models.infinity.transformer import Infinity
from pysteer.models.infinity.vae import InfinityVAE, VAEConfig
from pysteer.pickles import look_through, programs_of

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MASK_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_PLAIN_VAE_BITS = (16, 18, 20, 24, 32, 64)  # widths of the published tokenizers without patchify


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, the published name if the shape has one, parameters, and the configuration."""

    folder: Path
    kind: str
    name: str
    parameters: int
    config: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- reading


def _load_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            for program in programs_of(path):
                look_through(program, f"weights file {path.name}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in every way there is
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise InputError(
                "weights file holds more than tensors",
                value=str(path),
                allowed="a state dict that loads with weights_only=True",
                fix="save only its state dict where you trust the file",
            ) from error
        raise InputError(
            "weights file is truncated or not a PyTorch file",
            value=f"{path} ({path.stat().st_size} bytes)",
            allowed="a complete .pth, .bin or .safetensors file",
            fix="fetch it again",
        ) from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError("weights file not found", value=str(path), fix="check the path")
    if path.suffix == ".safetensors":
        return files.read_safetensors(path, finite=False)[0]
    return _load_pickle(path)


def _load_shards(folder: Path, index: str) -> dict[str, Tensor]:
    table = files.read_json(folder / index, "index of the shards")
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise InputError("index of the shards", value=str(folder / index), allowed="a weight_map of names to files")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise InputError("shard name leaves the folder", value=shard, allowed="plain file names")
        state.update(_state_dict(_load_file(folder / shard), str(folder / shard)))
    lost = sorted(set(names) - set(state))
    if lost:
        raise InputError("the shards lack tensors that their index names", value=", ".join(lost[:3]))
    return state


def load_weights(source: str | os.PathLike[str]) -> Any:
    """The object stored in a `.pth`, `.bin` or `.safetensors` file or a (sharded) folder, on the CPU.

    Raises:
        InputError: nothing there, a truncated file, a pickle that needs code to load, a shard missing.
    """
    path = Path(source)
    if not path.is_dir():
        return _load_file(path)
    for index in _INDEX_FILES:
        if (path / index).is_file():
            return _load_shards(path, index)
    for name in _SINGLE_FILES:
        if (path / name).is_file():
            return _load_file(path / name)
    raise InputError(
        "no weights in the folder", value=str(path), allowed=", ".join(_INDEX_FILES + _SINGLE_FILES), fix="check it"
    )


def _state_dict(data: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        found = ", ".join(map(str, list(data)[:4])) if isinstance(data, Mapping) else type(data).__name__
        raise InputError(f"no state dict in {where}", value=found, allowed="names with tensors")
    return {str(name): tensor for name, tensor in data.items()}


def _choose(data: Any, keys: tuple[str, ...], where: str) -> Any:
    for key in keys:
        if data.get(key) is not None:
            return data[key]
    raise InputError(f"{where} lacks {' or '.join(keys)}", value=", ".join(map(str, data)))


# ------------------------------------------------------------------------------------------------------ transformer


def transformer_state(data: Any, *, ema: bool = False, where: str = "the file") -> dict[str, Tensor]:
    """The state dict of a transformer under today's names, out of any layout the published code writes.

    Args:
        data: what `load_weights` gave.
        ema: take the moving average of a training checkpoint instead of its last weights.
        where: the source, for the errors.
    """
    if isinstance(data, Mapping) and "trainer" in data:
        keys = ("gpt_ema_fsdp", "gpt_ema_for_vis") if ema else ("gpt_fsdp", "gpt_wo_ddp")
        data = _choose(data["trainer"], keys, f"trainer of {where}")
    elif ema:
        raise InputError("moving average asked for", value=where, allowed="training checkpoints", fix="leave out ema")
    state = {}
    for name, tensor in _state_dict(data, where).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        name = re.sub(r"^blocks\.", "block_chunks.0.module.", name.removeprefix("module."))
        if name in _MASK_BUFFERS:
            continue
        if name.endswith("scale_mul_1H11"):  # stored as (1, 1, H, 1) by runs that used the flash kernel
            tensor = tensor.reshape(1, -1, 1, 1)
        state[name] = tensor
    for name in [name for name in state if name.endswith(".v_bias")]:
        state.setdefault(name.removesuffix("v_bias") + "zero_k_bias", torch.zeros_like(state[name]))
    return state


def _need(state: Mapping[str, Tensor], name: str, dims: int, what: str) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"not {what}: {name} is missing", value=", ".join(sorted(state)[:3]), fix="check the file")
    if state[name].ndim != dims:
        raise InputError(f"not {what}: shape of {name}", value=list(state[name].shape), allowed=f"{dims} dimensions")
    return tuple(state[name].shape)


def _preset_of(depth: int, dim: int, heads: int) -> str:
    return next((n for n, p in PRESETS.items() if (p.depth, p.dim, p.heads) == (depth, dim, heads)), "")


def transformer_config(
    state: Mapping[str, Tensor], *, pn: str | None = None, h_div_w: float = 1.0, patchify: bool | None = None
) -> InfinityConfig:
    """The configuration that a transformer's tensor shapes imply.

    Args:
        state: as `transformer_state` gives it.
        pn, h_div_w: image size and height / width of the default scale schedule; they are not in the weights.
            Default: the size the published model of this shape was made for, else `0.06M`.
        patchify: 2x2 patchify; None decides by the bits per token (56 means yes, 16 or 32 no).
    """
    what = "an Infinity transformer"
    dim, bits = _need(state, "word_embed.weight", 2, what)
    maxlen, text_dim = _need(state, "cfg_uncond", 2, what)
    levels = _need(state, "lvl_embed.weight", 2, what)[0]
    pool_heads = _need(state, "text_proj_for_sos.ca.mat_q", 3, what)[1]
    first = "block_chunks.0.module.0."
    heads = _need(state, first + "sa.scale_mul_1H11", 4, what)[1]
    hidden = _need(state, first + "ffn.fc1.weight", 2, what)[0]
    places = {m.groups() for name in state if (m := re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.", name))}
    depth, chunks = len(places), len({chunk for chunk, _ in places})
    name = _preset_of(depth, dim, heads)
    if patchify is None:
        patchify = PRESETS[name].patchify and bits % 4 == 0 if name else bits % 4 == 0 and bits not in _PLAIN_VAE_BITS
    shape: dict[str, Any] = {
        "depth": depth,
        "dim": dim,
        "heads": heads,
        "bits": bits,
        "scales": tuple(scale_schedule(pn or (PRESETS[name].pn if name else "0.06M"), h_div_w)),
        "mlp_ratio": 4.0 if round(4 * dim / 256) * 256 == hidden else hidden / dim,
        "text_dim": text_dim,
        "text_maxlen": maxlen,
        "patchify": patchify,
        "chunks": chunks,
        "max_scales": levels,
    }
    config = InfinityConfig(**shape)
    return config if config.pool_heads == pool_heads else InfinityConfig(**shape, text_heads=pool_heads)


def _checked(
    state: Mapping[str, Tensor], model: Callable[[], nn.Module], what: str, dtype: str
) -> tuple[dict[str, Tensor], int]:
    """The tensors that `model` needs, checked for name, shape, type and finite values; and its parameter count."""
    if dtype not in DTYPES:
        raise InputError("dtype", value=dtype, allowed=", ".join(DTYPES))
    with torch.device("meta"):
        skeleton = model()
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    for label, names in (("lacks", set(shapes) - set(state)), ("holds unexpected", set(state) - set(shapes))):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise InputError(
                f"{what} {label} {len(names)} tensors", value=shown, allowed=f"{len(shapes)} known tensors"
            )
    made = {}
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise InputError(f"{what}, shape of {name}", value=list(tensor.shape), allowed=str(list(shape)))
        if not tensor.is_floating_point():
            raise InputError(f"{what}, type of {name}", value=str(tensor.dtype), allowed="floating point")
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{what}, tensor {name}", value="NaN or infinity", allowed="finite values")
        wanted = DTYPES[dtype] or (tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32)
        made[name] = tensor.to(wanted)
    return made, sum(p.numel() for p in skeleton.parameters())


def convert_transformer(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pn: str | None = None,
    h_div_w: float = 1.0,
    patchify: bool | None = None,
    ema: bool = False,
    dtype: str = "keep",
) -> Converted:
    """Convert a transformer to `out/model.safetensors` and `out/config.json`; see `transformer_config` for the options.

    Raises:
        InputError: unreadable, foreign or damaged weights, or `out` is taken.
    """
    where = str(source)
    with files.new_folder(out) as folder:
        state = transformer_state(load_weights(source), ema=ema, where=where)
        config = transformer_config(state, pn=pn, h_div_w=h_div_w, patchify=patchify)
        tensors, parameters = _checked(state, lambda: Infinity(config), f"Infinity transformer {where}", dtype)
        files.write_safetensors(folder / "model.safetensors", tensors)
        files.write_json(folder / "config.json", config.to_dict())
    name = _preset_of(config.depth, config.dim, config.heads)
    return Converted(Path(out), "infinity-transformer", name, parameters, config.to_dict())


# -------------------------------------------------------------------------------------------------------- tokenizer


def vae_state(data: Any, *, ema: bool = False, where: str = "the file") -> dict[str, Tensor]:
    """Encoder and decoder weights under today's names; losses and the quantiser's buffers are left out."""
    if isinstance(data, Mapping) and ("vae" in data or "ema" in data):
        data = _choose(data, ("ema",) if ema else ("vae",), where)
    elif ema:
        raise InputError("moving average asked for", value=where, allowed="files with vae and ema", fix="leave out ema")
    state = {}
    for name, tensor in _state_dict(data, where).items():
        if not name.startswith(("encoder.", "decoder.")):
            continue
        stem, _, leaf = name.rpartition(".")
        if stem.rpartition(".")[2] not in ("conv", "norm") or re.search(r"(down|up)sample\.conv$", stem):
            # older files name the layer itself, not the one wrapped in it
            stem += ".norm" if re.search(r"norm(1|2|_out)$", stem) else ".conv"
        state[f"{stem}.{leaf}"] = tensor
    return state


def vae_config(state: Mapping[str, Tensor]) -> VAEConfig:
    """The configuration that a tokenizer's tensor shapes imply."""
    what = "an Infinity image tokenizer"
    base = _need(state, "encoder.conv_in.conv.weight", 4, what)[0]
    bits = _need(state, "encoder.conv_out.conv.weight", 4, what)[0]
    levels = {int(m[1]) for name in state if (m := re.match(r"encoder\.down\.(\d+)\.", name))}
    blocks = {int(m[1]) for name in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    widths = [
        _need(state, f"encoder.down.{level}.block.0.conv1.conv.weight", 4, what)[0] for level in range(len(levels))
    ]
    if not blocks or any(width % base for width in widths):
        raise InputError(f"not {what}: level widths", value=widths, allowed=f"multiples of {base}")
    return VAEConfig(bits, base, tuple(width // base for width in widths), len(blocks))


def convert_vae(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, ema: bool = False, dtype: str = "keep"
) -> Converted:
    """Convert an image tokenizer to `out/model.safetensors` and `out/config.json`.

    Raises:
        InputError: unreadable, foreign or damaged weights, or `out` is taken.
    """
    where = str(source)
    with files.new_folder(out) as folder:
        state = vae_state(load_weights(source), ema=ema, where=where)
        config = vae_config(state)
        tensors, parameters = _checked(state, lambda: InfinityVAE(config), f"image tokenizer {where}", dtype)
        files.write_safetensors(folder / "model.safetensors", tensors)
        files.write_json(folder / "config.json", asdict(config))
    name = f"d{config.bits} f{config.stride}"
    return Converted(Path(out), "infinity-vae", name, parameters, asdict(config))


# ---------------------------------------------------------------------------------------------------- whole pipeline


def _write_text_encoder(source: str | os.PathLike[str], folder: Path) -> int:
    """Save the encoder half and the tokenizer of a T5 model of transformers; returns its width."""
    from transformers import AutoTokenizer, T5EncoderModel

    if not (Path(source) / "config.json").is_file():
        raise InputError(
            "text encoder folder", value=str(source), allowed="a T5 model of transformers with config.json"
        )
    try:
        encoder = T5EncoderModel.from_pretrained(source, dtype="auto")
        words = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise InputError(f"text encoder cannot be read ({error})", value=str(source), fix="fetch it again") from error
    encoder.save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "text_tokenizer")
    return int(encoder.config.d_model)


def convert_pipeline(
    out: str | os.PathLike[str],
    *,
    transformer: str | os.PathLike[str],
    vae: str | os.PathLike[str],
    text_encoder: str | os.PathLike[str],
    **options: Any,
) -> Converted:
    """Convert all parts into one folder for `InfinityPipeline.from_pretrained`.

    Args:
        out: new folder.
        transformer: source of `convert_transformer`, which takes the `options`.
        vae: source of `convert_vae`.
        text_encoder: local folder of the T5 model (flan-t5-xl for the published weights).

    Raises:
        InputError: a part is damaged, or the parts do not belong together.
    """
    with files.new_folder(out) as folder:
        made = convert_transformer(transformer, folder / "transformer", **options)
        tokenizer = convert_vae(vae, folder / "tokenizer", dtype=options.get("dtype", "keep"))
        per_code = 4 if made.config["patchify"] else 1
        if made.config["bits"] != per_code * tokenizer.config["bits"]:
            raise InputError(
                "bits of the image tokenizer",
                value=tokenizer.config["bits"],
                allowed=f"{made.config['bits'] // per_code}, as the transformer has {made.config['bits']} per token",
                fix="give the tokenizer the transformer was trained with",
            )
        width = _write_text_encoder(text_encoder, folder)
        if width != made.config["text_dim"]:
            raise InputError(
                "width of the text encoder", value=width, allowed=str(made.config["text_dim"]), fix="use flan-t5-xl"
            )
        files.write_json(folder / "pipeline.json", {"pipeline": "InfinityPipeline", "tokenizer": "InfinityVAE"})
    return Converted(Path(out), "infinity", made.name, made.parameters + tokenizer.parameters, made.config)


KINDS: dict[str, Callable[..., Converted]] = {
    "infinity-transformer": convert_transformer,
    "infinity-vae": convert_vae,
}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str = "infinity-transformer",
    **options: Any,
) -> Converted:
    """Convert one part; `kind` is a key of `KINDS`, and `options` are those of its function."""
    if kind not in KINDS:
        raise InputError("kind of weights", value=kind, allowed=", ".join(KINDS))
    return KINDS[kind](source, out, **options)
