"""Shape of an Infinity model (Han et al. 2024, "Infinity: Scaling Bitwise AutoRegressive Modeling")."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from pysteer.errors import InputError


@dataclass(frozen=True)
class InfinityConfig:
    """Everything that fixes the parameter shapes and the arithmetic of one Infinity transformer.

    Attributes:
        depth: number of transformer blocks.
        dim: width D of the residual stream.
        heads: attention heads; ``dim / heads`` must be a multiple of 4 (2-D RoPE).
        mlp_ratio: FFN hidden width over ``dim``, rounded to a multiple of 256 as the published code does.
        text_dim: width of the text encoder's hidden states.
        text_maxlen: length of the learned unconditional text, and the longest text.
        bits: bits per image token (after patchify: four times the tokenizer's width).
        patchify: 2x2 spatial patchify between the tokenizer and the transformer (the 8B model).
        chunks: how the blocks are grouped in the state dict (``block_chunks.{c}.module.{j}``).
        scales: ``(height, width)`` of every scale, coarse to fine; the default schedule of the model.
        max_scales: rows of the level embedding.
        norm_eps: epsilon of every norm.
        text_heads: heads of the attentive text pool; 0 means one per 128 text channels (per 64 if D > 4096).
        rope_restart: reproduce the published code without its fused norm, where rotary positions restart at
            every scale. Off by default: it is a defect.
    """

    depth: int
    dim: int
    heads: int
    bits: int
    scales: tuple[tuple[int, int], ...]
    mlp_ratio: float = 4.0
    text_dim: int = 2048
    text_maxlen: int = 512
    patchify: bool = False
    chunks: int = 1
    max_scales: int = 15
    norm_eps: float = 1e-6
    text_heads: int = 0
    rope_restart: bool = False
    extra: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple((int(h), int(w)) for h, w in self.scales))
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise InputError("heads", value=self.heads, allowed=f"divisors of dim={self.dim} with head width % 4 == 0")
        if self.hidden_dim < 1:  # rounding to 256 would leave a small model without its FFN
            raise InputError("mlp_ratio", value=self.mlp_ratio, allowed=f"above {128 / self.dim:g} at dim={self.dim}")
        if self.depth % self.chunks:
            raise InputError("chunks", value=self.chunks, allowed=f"divisors of depth={self.depth}")
        if self.dim % self.pool_heads:
            raise InputError("text_heads", value=self.pool_heads, allowed=f"divisors of dim={self.dim}")
        if len(self.scales) > self.max_scales:
            raise InputError("scales", value=len(self.scales), allowed=f"at most max_scales={self.max_scales}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """FFN width, a multiple of 256 in the published configurations."""
        return round(self.dim * self.mlp_ratio / 256) * 256

    @property
    def pool_heads(self) -> int:
        return self.text_heads or max(1, self.text_dim // (64 if self.dim > 4096 else 128))

    @property
    def code_dim(self) -> int:
        """Channels of the image tokenizer: ``bits``, or a quarter of it with patchify."""
        return self.bits // 4 if self.patchify else self.bits

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(h * w for h, w in self.scales)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> InfinityConfig:
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict):
            raise InputError("Infinity config", value=type(data).__name__, allowed="a JSON object")
        unknown = sorted(set(data) - names)
        if unknown:
            raise InputError("Infinity config key", value=unknown[0], allowed=", ".join(sorted(names)))
        for name in ("depth", "dim", "heads", "bits", "scales"):
            if name not in data:
                raise InputError("Infinity config lacks a key", value=name, fix="fetch or convert it again")
        for name, value in data.items():
            _check_field(name, value)
        return cls(**data)


_LIMITS = {"depth": 1024, "chunks": 1024, "max_scales": 1024, "heads": 4096, "text_heads": 4096}


def _check_field(name: str, value: object) -> None:
    """Refuse a value of another type, or one so large that even a model without memory takes long to make."""
    if name == "scales":
        pairs = isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in value)
        sizes = [size for pair in value for size in pair] if pairs else []  # type: ignore[attr-defined]
        fits = bool(sizes) and all(len(pair) == 2 for pair in value)  # type: ignore[attr-defined]
        if not fits or not all(type(size) is int and 1 <= size <= 1024 for size in sizes):
            raise InputError("scales of the Infinity config", value=value, allowed="pairs of numbers from 1 to 1024")
    elif name in ("patchify", "rope_restart"):
        if not isinstance(value, bool):
            raise InputError(f"{name} of the Infinity config", value=value, allowed="true or false")
    elif name in ("mlp_ratio", "norm_eps"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1000:
            raise InputError(f"{name} of the Infinity config", value=value, allowed="a number above 0, below 1000")
    elif name != "extra":
        most, least = _LIMITS.get(name, 2**20), int(name != "text_heads")
        if type(value) is not int or not least <= value <= most:
            raise InputError(
                f"{name} of the Infinity config", value=value, allowed=f"a whole number, {least} to {most}"
            )
