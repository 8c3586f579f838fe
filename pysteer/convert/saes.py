"""Sparse autoencoders of SAeUron and sparsify, SAELens, dictionary_learning and sdxl-unbox.

All become a `SparseAutoencoder` that gives the same latents and reconstructions. What can be folded into the weights
is: gated encoders are JumpReLU ones, since with `a = e^r W(x - b) + b_mag` the gate `W(x - b) + b_gate > 0` is
`a > b_mag - e^r b_gate`; top k by the length of the directions is top k with directions of length 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.convert.reading import check_number, check_tensor, check_vector, read_pickle, state_of
from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder

_LARGEST_FILE = 64 * 1024**3
_KEPT = (torch.float32, torch.bfloat16, torch.float16)
_NORMALISATIONS = {None: "none", "none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "unit_norm"}


@dataclass(frozen=True)
class SparsifyOptions:
    """Options of `load_sparsify`.

    Attributes:
        as_trained: keep the choice over a batch or a sample of a SAeUron autoencoder; the published code drops it when
            it loads one and takes the k largest of every token.
    """

    as_trained: bool = False


@dataclass(frozen=True)
class SAELensOptions:
    """Options of `load_saelens`.

    Attributes:
        scale: factor that brings activations to the length the autoencoder was trained on, where it asks for one
            (normalize_activations expected_average_only_in); folded into the weights.
    """

    scale: float | None = None


@dataclass(frozen=True)
class DictionaryOptions:
    """Options of `load_dictionary`.

    Attributes:
        unit_decoder: scale the latents of an AutoEncoder so that directions have length 1, as the published loader
            does.
    """

    unit_decoder: bool = True


@dataclass(frozen=True)
class UnboxOptions:
    """`load_unbox` has no options."""


def _config(path: Path, what: str) -> dict[str, Any]:
    config = files.read_json(path, what)
    if not isinstance(config, dict):
        raise InputError(what, value=type(config).__name__, allowed="a JSON object")
    return config


def _weights(path: Path, names: tuple[str, ...], optional: tuple[str, ...], what: str) -> dict[str, Tensor]:
    if path.is_file() and path.stat().st_size > _LARGEST_FILE:
        raise InputError(f"size of {what}", value=f"{path.stat().st_size} bytes", allowed=f"at most {_LARGEST_FILE}")
    tensors, _ = files.read_safetensors(path, what, finite=False)
    return _named(tensors, names, optional, what)


def _named(state: Mapping[str, Any], names: tuple[str, ...], optional: tuple[str, ...], what: str) -> dict[str, Any]:
    """`state` with exactly the tensors that a kind of autoencoder has."""
    for name in names:
        if name not in state:
            found = ", ".join(list(state)[:8])
            raise InputError(
                f"{what} lacks {name}", value=found, allowed=", ".join(names), fix="check which kind it is"
            )
    for name in state:
        if name not in (*names, *optional):
            raise InputError(f"{what} holds an unknown tensor", value=name, allowed=", ".join((*names, *optional)))
    return dict(state)


def _kept(tensor: Tensor) -> Tensor:
    """In the type it was stored in; fp64 becomes fp32.

    Raises:
        InputError: a value is too large for it.
    """
    result = tensor.detach().to(tensor.dtype if tensor.dtype in _KEPT else torch.float32).contiguous()
    if not bool(result.isfinite().all()):
        raise InputError("weights of the autoencoder", value="out of range", allowed=f"finite in {result.dtype}")
    return result


def _matrices(encoder: Any, decoder: Any, what: str, *, columns: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Encoder and decoder `[M, D]`; `columns` says which of them is stored as `[D, M]`."""
    first = check_tensor(encoder, (None, None), f"{what}, encoder")
    shape = tuple(first.shape)[::-1] if columns[0] else tuple(first.shape)
    second = check_tensor(decoder, shape[::-1] if columns[1] else shape, f"{what}, decoder")
    return _kept(first.T if columns[0] else first), _kept(second.T if columns[1] else second)


def _vector(tensor: Any, size: int, where: str) -> Tensor:
    check_vector(tensor, size, where)
    return _kept(tensor.reshape(-1))


def _declared(config: Mapping[str, Any], name: str, size: int, what: str) -> None:
    """Refuse weights of another size than their configuration says."""
    if name in config and config[name] != size:
        raise InputError(f"{what}, {name}", value=config[name], allowed=f"{size}, as the weights have")


# ------------------------------------------------------------------------------------------------ SAeUron, sparsify


def load_sparsify(folder: str | Path, *, as_trained: bool = False) -> SparseAutoencoder:
    """Read `cfg.json` and `sae.safetensors`.

    Args:
        folder: of one layer.
        as_trained: see `SparsifyOptions`.

    Raises:
        InputError: files are missing, damaged or do not fit together, or it is a transcoder or groups its latents.
    """
    what = "sparsify autoencoder"
    config = _config(Path(folder) / "cfg.json", f"configuration of the {what}")
    for name, plain in (("transcode", False), ("skip_connection", False), ("activation", "topk")):
        if config.get(name, plain) != plain:
            raise InputError(f"{name} of the {what}", value=config[name], allowed=str(plain))
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    state = _weights(Path(folder) / "sae.safetensors", names, (), what)
    encoder, decoder = _matrices(state["encoder.weight"], state["W_dec"], what, columns=(False, False))
    latents, width = encoder.shape
    _declared(config, "d_in", width, what)
    if config.get("num_latents"):
        _declared(config, "num_latents", latents, what)
    trained = next((name for name in ("sample_topk", "batch_topk") if config.get(name)), "topk")
    return SparseAutoencoder(
        encoder,
        _vector(state["encoder.bias"], latents, f"{what}, encoder.bias"),
        decoder,
        _vector(state["b_dec"], width, f"{what}, b_dec"),
        activation=trained if as_trained else "topk",
        k=check_number(config.get("k"), f"k of the {what}", 1, latents, whole=True),
        normalise="layer_norm" if config.get("input_unit_norm") else "none",
        meta={"source": "sparsify", "trained_as": trained},
    )


# ---------------------------------------------------------------------------------------------------------- SAELens

_LENS_NAMES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def load_saelens(folder: str | Path, *, scale: float | None = None) -> SparseAutoencoder:
    """Read `cfg.json` and `sae_weights.safetensors` of the architectures standard, topk, jumprelu and gated.

    Args:
        folder: of one autoencoder, as SAELens 3 to 6 writes it.
        scale: see `SAELensOptions`.

    Raises:
        InputError: files are missing, damaged or do not fit together, or it is of another architecture.
    """
    what = "SAELens autoencoder"
    config = _config(Path(folder) / "cfg.json", f"configuration of the {what}")
    architecture, k = _lens_architecture(config, what)
    names = ("W_enc", "W_dec", "b_dec", *_LENS_NAMES[architecture])
    state = _weights(Path(folder) / "sae_weights.safetensors", names, ("scaling_factor",), what)
    encoder, decoder = _matrices(state["W_enc"], state["W_dec"], what, columns=(True, False))
    latents, width = encoder.shape
    _declared(config, "d_in", width, what)
    _declared(config, "d_sae", latents, what)
    vectors = {name: _vector(state[name], latents, f"{what}, {name}") for name in _LENS_NAMES[architecture]}
    bias = _vector(state["b_dec"], width, f"{what}, b_dec")
    encoder, encoder_bias, threshold = _lens_encoder(architecture, encoder, vectors)
    if config.get("rescale_acts_by_decoder_norm") and architecture == "topk":
        length = decoder.float().norm(dim=1)
        if not bool((length > 0).all()):
            raise InputError(f"{what}, W_dec", value="a direction of length 0", allowed="none, as k goes by the length")
        encoder = (encoder.float() * length[:, None]).to(encoder.dtype)
        encoder_bias = (encoder_bias.float() * length).to(encoder_bias.dtype)
        decoder = (decoder.float() / length[:, None]).to(decoder.dtype)
    if "scaling_factor" in state:
        decoder = _kept(decoder * _vector(state["scaling_factor"], latents, f"{what}, scaling_factor")[:, None])
    factor = _lens_scale(config, scale, what)
    return SparseAutoencoder(
        _kept(encoder * factor),
        encoder_bias,
        _kept(decoder / factor),
        _kept(bias / factor),
        activation={"topk": "topk", "standard": "relu"}.get(architecture, "jumprelu"),
        k=None if k is None else check_number(k, f"k of the {what}", 1, latents, whole=True),
        threshold=threshold,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        normalise=_lens_normalisation(config, what),
        meta={"source": "SAELens", "architecture": architecture, **_lens_meta(config)},
    )


def _lens_architecture(config: Mapping[str, Any], what: str) -> tuple[str, Any]:
    """Its name in version 6, and k."""
    architecture = config.get("architecture", "standard")
    old = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    arguments = config.get("activation_fn_kwargs")
    k = config.get("k")
    if old == "topk":
        architecture, k = "topk", arguments.get("k", k) if isinstance(arguments, dict) else k
    elif old not in ("relu", None):
        raise InputError(f"activation of the {what}", value=old, allowed="relu, topk")
    if not isinstance(architecture, str) or architecture not in _LENS_NAMES:
        raise InputError(f"architecture of the {what}", value=architecture, allowed=", ".join(_LENS_NAMES))
    return architecture, k if architecture == "topk" else None


def _lens_encoder(
    architecture: str, encoder: Tensor, vectors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    if architecture != "gated":
        return encoder, vectors["b_enc"], vectors.get("threshold")
    return gated_as_jumprelu(encoder, vectors["r_mag"], vectors["b_gate"], vectors["b_mag"])


def gated_as_jumprelu(encoder: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder, its bias and thresholds of the JumpReLU autoencoder that a gated one is; see the module."""
    stretch = r_mag.double().exp()
    threshold = (b_mag.double() - stretch * b_gate.double()).to(torch.float32)
    result = (encoder.double() * stretch[:, None]).to(encoder.dtype)
    if not bool(result.isfinite().all()) or not bool(threshold.isfinite().all()):
        raise InputError(
            "r_mag of the gated autoencoder", value=f"up to {r_mag.max():g}", allowed="a finite exponential"
        )
    return result, b_mag, threshold


def _lens_scale(config: Mapping[str, Any], scale: float | None, what: str) -> float:
    asked = config.get("normalize_activations")
    wanted = asked is True or asked == "expected_average_only_in"
    if scale is not None:
        check_number(scale, "scale", 1e-12, 1e12)
    if wanted and scale is None:
        raise InputError(f"{what}, normalize_activations", value=asked, allowed="with scale", fix="give scale=...")
    if scale is not None and not wanted:
        raise InputError("scale", value=scale, allowed=f"none: the {what} asks for no scaling")
    return 1.0 if scale is None else float(scale)


def _lens_normalisation(config: Mapping[str, Any], what: str) -> str:
    asked = config.get("normalize_activations")
    if isinstance(asked, bool) or asked == "expected_average_only_in":
        return "none"
    if not isinstance(asked, str | None) or asked not in _NORMALISATIONS:
        allowed = "none, layer_norm, constant_norm_rescale, expected_average_only_in"
        raise InputError(f"normalize_activations of the {what}", value=asked, allowed=allowed)
    return _NORMALISATIONS[asked]


def _lens_meta(config: Mapping[str, Any]) -> dict[str, str]:
    nested = config.get("metadata")
    everything = {**config, **(nested if isinstance(nested, dict) else {})}
    wanted = ("model_name", "hook_name", "hook_point", "reshape_activations")
    return {name: str(everything[name])[:200] for name in wanted if everything.get(name)}


# ---------------------------------------------------------------------------------------------- dictionary_learning

_TOP = ("k", "threshold")
_DICTIONARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AutoEncoder": (("encoder.weight", "encoder.bias", "decoder.weight", "bias"), ()),
    "AutoEncoderNew": (("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"), ()),
    "GatedAutoEncoder": (
        ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
        (),
    ),
    "JumpReluAutoEncoder": (("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), ()),
    "AutoEncoderTopK": (("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"), _TOP),
    "BatchTopKSAE": (("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"), _TOP),
    "MatryoshkaBatchTopKSAE": (("W_enc", "b_enc", "W_dec", "b_dec"), (*_TOP, "group_sizes")),
}


def load_dictionary(folder: str | Path, *, unit_decoder: bool = True) -> SparseAutoencoder:
    """Read `ae.pt` and `config.json` of dictionary_learning.

    Top k over a batch is applied as its code applies it: by the threshold that was learned, if one was.

    Args:
        folder: of one trainer.
        unit_decoder: see `DictionaryOptions`.

    Raises:
        InputError: files are missing, damaged, hold code or do not fit together, or it is of another class.
    """
    what = "dictionary"
    config = _config(Path(folder) / "config.json", f"configuration of the {what}").get("trainer")
    kind = config.get("dict_class") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise InputError(f"dict_class of the {what}", value=kind, allowed=", ".join(_DICTIONARIES))
    state = state_of(read_pickle(Path(folder) / "ae.pt", what, largest=_LARGEST_FILE), what)
    state = _named(state, *_DICTIONARIES[kind], what)
    own = "W_enc" in state
    encoder, decoder = _matrices(
        state["W_enc" if own else "encoder.weight"],
        state["W_dec" if own else "decoder.weight"],
        what,
        columns=(own, not own),
    )
    latents, width = encoder.shape
    _declared(config, "activation_dim", width, what)
    _declared(config, "dict_size", latents, what)
    names = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    name = names.get(kind, "b_dec")
    bias = _vector(state[name], width, f"{what}, {name}")
    given: dict[str, Any] = {"meta": {"source": "dictionary_learning", "dict_class": kind}}
    if kind == "GatedAutoEncoder":
        vectors = [_vector(state[name], latents, f"{what}, {name}") for name in ("r_mag", "gate_bias", "mag_bias")]
        encoder, encoder_bias, threshold = gated_as_jumprelu(encoder, *vectors)
        given |= {"activation": "jumprelu", "threshold": threshold}
    else:
        name = "b_enc" if own else "encoder.bias"
        encoder_bias = _vector(state[name], latents, f"{what}, {name}")
        given |= _dictionary_activation(kind, config, state, latents, what)
    made = SparseAutoencoder(encoder, encoder_bias, decoder, bias, **given)
    return made.with_unit_decoder() if kind == "AutoEncoder" and unit_decoder else made


def _dictionary_activation(
    kind: str, config: Mapping[str, Any], state: Mapping[str, Any], latents: int, what: str
) -> dict[str, Any]:
    if kind == "JumpReluAutoEncoder":
        threshold = _vector(state["threshold"], latents, f"{what}, threshold")
        return {"activation": "jumprelu", "threshold": threshold, "centred": False}
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return {"activation": "relu", "centred": kind == "AutoEncoder"}
    k = state.get("k", config.get("k"))
    k = k.item() if isinstance(k, Tensor) and k.numel() == 1 else k
    k = check_number(k, f"k of the {what}", 1, latents, whole=True)
    if kind == "AutoEncoderTopK":
        return {"activation": "topk", "k": k}
    learned = float(check_vector(state["threshold"], 1, f"{what}, threshold")) if "threshold" in state else -1.0
    if learned < 0:  # never updated
        return {"activation": "batch_topk", "k": k}
    return {"activation": "jumprelu", "threshold": torch.full((latents,), learned)}


# ------------------------------------------------------------------------------------------------------- sdxl-unbox


def load_unbox(folder: str | Path) -> SparseAutoencoder:
    """Read `state_dict.pth` and `config.json` of sdxl-unbox, and `mean.pt` and `std.pt` where they are there.

    It reads what a block adds (`meta["reads"]` is "delta"). Mean and standard deviation are those of the latents where
    they are active; its demos set a latent to a multiple of `k` times the mean.

    Raises:
        InputError: files are missing, damaged, hold code or do not fit together.
    """
    what = "sdxl-unbox autoencoder"
    config = _config(Path(folder) / "config.json", f"configuration of the {what}")
    data = read_pickle(Path(folder) / "state_dict.pth", what, largest=_LARGEST_FILE)
    data = data["state_dict"] if isinstance(data, Mapping) and "state_dict" in data else data
    names = ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
    state = _named(state_of(data, what), names, ("stats_last_nonzero",), what)
    encoder, decoder = _matrices(state["encoder.weight"], state["decoder.weight"], what, columns=(False, True))
    latents, width = encoder.shape
    _declared(config, "d_model", width, what)
    _declared(config, "n_dirs_local", latents, what)
    statistics: dict[str, Any] = {}
    for name, file in (("latent_mean", "mean.pt"), ("latent_std", "std.pt")):
        if (Path(folder) / file).is_file():
            found = read_pickle(Path(folder) / file, f"{what}, {file},", largest=_LARGEST_FILE)
            statistics[name] = _vector(found, latents, f"{what}, {file}")
    return SparseAutoencoder(
        encoder,
        _vector(state["latent_bias"], latents, f"{what}, latent_bias"),
        decoder,
        _vector(state["pre_bias"], width, f"{what}, pre_bias"),
        activation="topk",
        k=check_number(config.get("k"), f"k of the {what}", 1, latents, whole=True),
        meta={"source": "sdxl-unbox", "reads": "delta"},
        **statistics,
    )


def finish(sae: SparseAutoencoder, out: Path) -> str:
    """Save it; returns what to tell."""
    sae.save_pretrained(out)
    k = f", k {sae.k}" if sae.k is not None else ""
    return f"autoencoder of {sae.latents:,} latents of width {sae.width} ({sae.activation}{k}) in {out}"
