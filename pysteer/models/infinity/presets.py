"""The published Infinity configurations by name.

Shapes as registered in FoundationVision/Infinity (`infinity/models/infinity.py`, `tools/run_infinity.py`). `layer12`
(125M) to `layer48` are the sizes of its scaling study. `20b` is only a registered shape, without published weights or
loader: its tokenizer width and its chunks here are assumptions.
"""

import difflib
from dataclasses import dataclass

from pysteer.errors import InputError
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.schedule import scale_schedule

TEXT_DIM = 2048  # hidden width of flan-t5-xl
TEXT_MAXLEN = 512


@dataclass(frozen=True)
class Preset:
    """One published shape; `vae_bits` is the width of its tokenizer and `pn` the image size it was made for."""

    depth: int
    dim: int
    heads: int
    chunks: int
    vae_bits: int
    pn: str
    patchify: bool = False

    @property
    def bits(self) -> int:
        """Bits per image token: the tokenizer's width, four times that with 2x2 patchify."""
        return 4 * self.vae_bits if self.patchify else self.vae_bits


PRESETS: dict[str, Preset] = {
    "layer12": Preset(12, 768, 8, 4, 16, "0.06M"),
    "layer16": Preset(16, 1152, 12, 4, 16, "0.06M"),
    "layer24": Preset(24, 1536, 16, 4, 16, "0.06M"),
    "layer32": Preset(32, 2080, 20, 4, 16, "0.06M"),
    "layer40": Preset(40, 2688, 24, 4, 16, "0.06M"),
    "layer48": Preset(48, 3360, 28, 4, 16, "0.06M"),
    "2b": Preset(32, 2048, 16, 8, 32, "1M"),
    "8b": Preset(40, 3584, 28, 8, 14, "1M", patchify=True),
    "20b": Preset(58, 4608, 36, 2, 32, "1M"),
}


def preset(name: str, *, pn: str | None = None, h_div_w: float = 1.0, rope_restart: bool = False) -> InfinityConfig:
    """The configuration of a published model.

    Args:
        name: a key of `PRESETS`, with or without the prefix `infinity_`.
        pn: image size of the scale schedule; None takes the one the model was made for.
        h_div_w: height / width of the scale schedule; the nearest published ratio is used.
        rope_restart: reproduce the published code without its fused norm, see `InfinityConfig`.

    Raises:
        InputError: unknown name or image size.
    """
    key = name.removeprefix("infinity_")
    if key not in PRESETS:
        close = difflib.get_close_matches(key, PRESETS, n=1)
        fix = f"did you mean {close[0]}?" if close else "choose one of them"
        raise InputError("Infinity model name", value=name, allowed=", ".join(PRESETS), fix=fix)
    shape = PRESETS[key]
    return InfinityConfig(
        depth=shape.depth,
        dim=shape.dim,
        heads=shape.heads,
        bits=shape.bits,
        scales=tuple(scale_schedule(pn or shape.pn, h_div_w)),
        text_dim=TEXT_DIM,
        text_maxlen=TEXT_MAXLEN,
        patchify=shape.patchify,
        chunks=shape.chunks,
        rope_restart=rope_restart,
    )
