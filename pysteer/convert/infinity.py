"""Options of the official Infinity weights on the command line; `pysteer.models.infinity.convert` does the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer.errors import InputError


@dataclass(frozen=True)
class InfinityVAEOptions:
    """Options of an image tokenizer.

    Attributes:
        ema: take the moving average of a checkpoint.
        dtype: type to store: keep, fp32, bf16 or fp16.
    """

    ema: bool | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class InfinityOptions:
    """Options of a transformer, and of the whole pipeline around it.

    Attributes:
        vae: image tokenizer; makes a whole pipeline.
        text_encoder: T5 folder; makes a whole pipeline.
        pn: resolution the weights are for, such as 0.06M or 1M.
        h_div_w: height over width of the images.
        patchify: whether tokens are 2x2 patches of bits.
        ema: take the moving average of a checkpoint.
        dtype: type to store: keep, fp32, bf16 or fp16.
    """

    vae: Path | None = None
    text_encoder: Path | None = None
    pn: str | None = None
    h_div_w: float | None = None
    patchify: bool | None = None
    ema: bool | None = None
    dtype: str | None = None


def convert_transformer(source: Path, out: Path, options: InfinityOptions) -> str:
    """Convert a transformer, or with the other two parts a pipeline."""
    from pysteer.models.infinity import convert as conversion

    given = _given(options)
    vae, text_encoder = given.pop("vae", None), given.pop("text_encoder", None)
    if (vae is None) != (text_encoder is None):
        raise InputError("a pipeline needs both --vae and --text-encoder", fix="give both, or none to convert one part")
    if vae is None:
        return _told(conversion.convert(source, out, "infinity-transformer", **given))
    parts = {"transformer": source, "vae": vae, "text_encoder": text_encoder}
    return _told(conversion.convert_pipeline(out, **parts, **given))


def convert_vae(source: Path, out: Path, options: InfinityVAEOptions) -> str:
    """Convert an image tokenizer."""
    from pysteer.models.infinity import convert as conversion

    return _told(conversion.convert(source, out, "infinity-vae", **_given(options)))


def _given(options: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if value is not None}


def _told(done: Any) -> str:
    return f"{done.kind} {done.name or 'of no published size'}: {done.parameters:,} parameters in {done.folder}"
