"""From prompts to images: text encoder, Infinity transformer and image tokenizer in one object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.generate import Decoding
from pysteer.models.infinity.text import encode_text
from pysteer.models.infinity.transformer import Infinity, TextCondition

RowListener = Callable[[str, int, int, Tensor | None], None]


@dataclass
class ImageOutput:
    """images: uint8 ``[B, H, W, 3]`` RGB; bits: per scale ``[B, L, d]`` int64; features: ``[B, d, h, w]``."""

    images: Tensor
    bits: list[Tensor]
    features: Tensor


class InfinityPipeline:
    """Text-to-image with an Infinity transformer.

    Args:
        transformer: the transformer.
        tokenizer: image tokenizer with ``encode(images [B, 3, H, W] in [-1, 1]) -> [B, d, h, w]`` and ``decode``.
        text_encoder: a transformers ``T5EncoderModel``.
        text_tokenizer: its fast tokenizer.
        defaults: generation settings used where a call names none (``cfg``, ``tau``, ``top_p``).
    """

    def __init__(
        self,
        transformer: Infinity,
        tokenizer: Any,
        text_encoder: Any,
        text_tokenizer: Any,
        defaults: dict | None = None,
    ):
        self.transformer = transformer.eval()
        self.tokenizer = tokenizer.eval()
        self.text_encoder = text_encoder.eval()
        self.text_tokenizer = text_tokenizer
        self.defaults = {"cfg": 3.0, "tau": 0.5, "top_p": 0.97, **(defaults or {})}
        self.text_clock = torch.zeros((), dtype=torch.int64)
        self.text_row_listeners: list[RowListener] = []
        self._step: Callable[..., Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_start.device

    def to(self, device: str | torch.device) -> InfinityPipeline:
        """Move all parts to a device."""
        for part in (self.transformer, self.tokenizer, self.text_encoder):
            part.to(device)
        self.text_clock = self.text_clock.to(device)
        return self

    def compile(self, **options: Any) -> InfinityPipeline:
        """Compile the work of one scale with ``torch.compile(fullgraph=True)``; steering stays adjustable."""
        self._step = torch.compile(self.transformer.scale_step, **{"fullgraph": True, **options})
        return self

    def encode_text(self, prompts: Sequence[str], *, kind: str = "cond") -> TextCondition:
        """Encode prompts. ``kind`` "uncond" marks them as rows of the unconditional half (negative prompts)."""
        if kind not in ("cond", "uncond"):
            raise InputError("kind", value=kind, allowed="cond, uncond")
        lengths = self._lengths(prompts) if self.text_row_listeners else None
        cond, uncond = (len(prompts), 0) if kind == "cond" else (0, len(prompts))
        for listener in list(self.text_row_listeners):
            listener("text", cond, uncond, lengths)
        return encode_text(self.text_encoder, self.text_tokenizer, prompts, self.transformer.config.text_maxlen)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of every prompt, without padding."""
        limit = self.transformer.config.text_maxlen
        ids: list[list[int]] = self.text_tokenizer(list(prompts), truncation=True, max_length=limit)["input_ids"]
        return ids

    def _lengths(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([len(row) for row in self.token_ids(prompts)], device=self.device)

    def pooled(self, condition: TextCondition) -> Tensor:
        """The pooled text vector ``[B, D]`` fp32 that drives the AdaLN."""
        with torch.no_grad():
            return self.transformer.condition(condition).pooled

    def seeds(self, seeds: int | Sequence[int], batch: int) -> Tensor:
        """One int64 seed per image; a single number counts up from itself."""
        values = list(range(seeds, seeds + batch)) if isinstance(seeds, int) else [int(s) for s in seeds]
        if len(values) != batch:
            raise InputError("seeds", value=len(values), allowed=f"one number or {batch} numbers (one per prompt)")
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | TextCondition,
        *,
        seeds: int | Sequence[int] = 0,
        negative_prompts: str | Sequence[str] | None = None,
        decode: bool = True,
        **settings: Any,
    ) -> ImageOutput:
        """Generate one image per prompt.

        ``settings`` are those of :func:`pysteer.models.infinity.generate.generate` (cfg, tau, top_p, greedy,
        cfg_insertion_layer, forced_bits, scales, on_scale). Prompts may be encoded beforehand.
        """
        out = self.begin(prompts, seeds=seeds, negative_prompts=negative_prompts, **settings).advance()
        return self.finish(out, decode)

    def begin(
        self,
        prompts: str | Sequence[str] | TextCondition,
        *,
        seeds: int | Sequence[int] = 0,
        negative_prompts: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> Decoding:
        """What `__call__` does, up to the first scale: to be advanced, forked and then given to `finish`."""
        if isinstance(prompts, TextCondition):
            text = prompts
        else:
            text = self.encode_text([prompts] if isinstance(prompts, str) else list(prompts))
        negative = None if negative_prompts is None else self._negative(negative_prompts, text)
        return Decoding(
            self.transformer,
            text,
            seeds=self.seeds(seeds, len(text.lengths)),
            negative=negative,
            step=self._step,
            **{**self.defaults, **settings},
        )

    def finish(self, done: Decoding, decode: bool = True) -> ImageOutput:
        """The output of a generation that has computed all its scales."""
        images = self.decode(done.summed) if decode else torch.empty(0, dtype=torch.uint8)
        return ImageOutput(images, done.bits, done.summed)

    def _negative(self, given: str | Sequence[str], text: TextCondition) -> TextCondition | None:
        """Text of the unconditional rows; an empty negative prompt means the learned unconditional text."""
        batch = len(text.lengths)
        prompts = [given] * batch if isinstance(given, str) else list(given)
        if len(prompts) != batch:
            raise InputError("negative_prompts", value=len(prompts), allowed=f"one text or {batch} texts")
        if not any(prompts):
            return None
        negative = self.encode_text(prompts, kind="uncond")
        both = TextCondition.cat([negative, self.transformer.unconditional(text)])
        rows = torch.tensor([i if prompt else batch + i for i, prompt in enumerate(prompts)], device=self.device)
        return TextCondition(both.hidden[rows], both.lengths[rows])

    @torch.no_grad()
    def decode(self, features: Tensor, batch: int = 64) -> Tensor:
        """Images uint8 ``[B, H, W, 3]`` of summed codes ``[B, d, h, w]``, in batches to bound memory."""
        parts = [self.tokenizer.decode(part).float() for part in features.split(batch)]
        image = (torch.cat(parts).clamp(-1, 1) + 1) / 2
        return (image.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that :meth:`from_pretrained` reads: safetensors and JSON only."""
        folder = Path(folder)
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        state = {k: v.to(dtype) if dtype else v for k, v in self.transformer.state_dict().items()}
        files.write_safetensors(folder / "transformer" / "model.safetensors", state)
        files.write_json(folder / "transformer" / "config.json", self.transformer.config.to_dict())
        self.tokenizer.save_pretrained(folder / "tokenizer", dtype=dtype or torch.float32)
        with _quiet_transformers():
            _cast_copy(self.text_encoder, dtype).save_pretrained(folder / "text_encoder")
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        index = {"pipeline": "InfinityPipeline", "tokenizer": type(self.tokenizer).__name__, "defaults": self.defaults}
        files.write_json(folder / "pipeline.json", index)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> InfinityPipeline:
        """Load a folder written by :meth:`save_pretrained` or by ``pysteer convert``.

        ``dtype`` is that of the transformer and the text encoder; the residual stream, norms and logits stay fp32. The
        image tokenizer is always fp32.
        """
        from transformers import AutoTokenizer, T5EncoderModel

        folder = Path(folder)
        index = files.read_json(folder / "pipeline.json", "pipeline index")
        if not isinstance(index, dict) or not isinstance(index.get("defaults", {}), dict | None):
            raise InputError("pipeline index", value=str(folder), allowed="a JSON object, with an object as defaults")
        transformer = load_transformer(folder / "transformer", dtype)
        tokenizer = _tokenizer_class(index.get("tokenizer", "")).from_pretrained(folder / "tokenizer")
        with _quiet_transformers():
            encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        words = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
        return cls(transformer, tokenizer, encoder, words, index.get("defaults")).to(device)


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Infinity:
    """Load ``config.json`` and ``model.safetensors``; every tensor must fit by name and shape and be finite.

    The model is made without memory and takes over the tensors of the file, so that they are held once.
    """
    config = InfinityConfig.from_dict(files.read_json(folder / "config.json", "Infinity config"))
    with torch.device("meta"):
        model = Infinity(config)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    state, _ = files.read_safetensors(folder / "model.safetensors", "Infinity weights", shapes=shapes)
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    model.clock = torch.zeros((), dtype=torch.int64)
    return model.eval()


def _tokenizer_class(name: str) -> Any:
    if name == "ShapeTokenizer":
        from pysteer.zoo.shapes.tokenizer import ShapeTokenizer

        return ShapeTokenizer
    if name == "InfinityVAE":
        from pysteer.models.infinity.vae import InfinityVAE

        return InfinityVAE
    raise InputError("image tokenizer", value=name, allowed="ShapeTokenizer, InfinityVAE")


def _cast_copy(module: Any, dtype: torch.dtype | None) -> Any:
    return module if dtype is None else copy.deepcopy(module).to(dtype)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, which are longer than the work for a small encoder."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
