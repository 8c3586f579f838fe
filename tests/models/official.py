"""Runs the published Infinity code on a CPU, for comparison with the port.

The code is not part of this repository: clone FoundationVision/Infinity and set `PYSTEER_OFFICIAL_INFINITY` to the
folder.
Its undeclared or GPU-only dependencies are replaced while it is imported:

- `flash_attn`: plain SDPA over each sequence. The published cross-attention casts fp32 queries, keys and values to
  bf16 for the flash kernel; here the cast goes to fp32 instead (`_KeepFloat32`), so that the comparison can be held to
  1e-5. Everything else stays as published.
- `timm`, `torchvision`, `imageio`, `tqdm`, `pytz`: names only.
- `torch.compile` is the identity during the import, so that the fused norm runs eagerly.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIABLE = "PYSTEER_OFFICIAL_INFINITY"


def official_path() -> Path | None:
    """The folder of the published code, or None when it was not given."""
    value = os.environ.get(VARIABLE)
    return Path(value) if value else None


class _KeepFloat32:
    """`torch` as one module sees it, with bf16 read as fp32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
) -> Tensor:
    """Attention of `[B, L, H, d]` tensors; only its signature is looked at by the code under test."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of packed sequences: `q [sum Lq, H, d]`, `kv [sum Lk, 2, H, d]`."""
    outputs = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        one_q = q[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)
        k, v = kv[bounds_k[i] : bounds_k[i + 1]].permute(1, 2, 0, 3)
        outputs.append(F.scaled_dot_product_attention(one_q, k, v, scale=softmax_scale).transpose(0, 1))
    return torch.cat(outputs)


def _stub_modules() -> dict[str, types.ModuleType]:
    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        return made

    def drop_path(x: Tensor, *_: Any) -> Tensor:
        return x

    class DropPath(nn.Identity):
        pass

    layers = module("timm.models.layers", DropPath=DropPath, drop_path=drop_path)
    stubs = [
        module(
            "flash_attn",
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_kvpacked_func=flash_attn_varlen_kvpacked_func,
        ),
        module("timm"),
        module("timm.loss", SoftTargetCrossEntropy=type("SoftTargetCrossEntropy", (nn.Module,), {})),
        module("timm.models", register_model=lambda function: function, layers=layers),
        layers,
        module("torchvision", transforms=module("torchvision.transforms")),
        module("torchvision.transforms"),
        module("imageio"),
        module("pytz"),
        module("tqdm"),
    ]
    return {stub.__name__: stub for stub in stubs if importlib.util.find_spec(stub.__name__.split(".")[0]) is None}


@contextlib.contextmanager
def _import_surroundings(folder: Path) -> Iterator[None]:
    stubs, compile_ = _stub_modules(), torch.compile
    sys.path.insert(0, str(folder))
    sys.modules.update(stubs)
    torch.compile = lambda function=None, **_: function if function is not None else (lambda inner: inner)  # type: ignore
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.compile = compile_
        sys.path.remove(str(folder))
        for name in stubs:
            del sys.modules[name]


@functools.lru_cache(maxsize=1)
def load() -> types.SimpleNamespace:
    """Import the published code: `.infinity` and `.basic` (transformer), `.bsq`, `.correction` (quantiser), `.vae`."""
    folder = official_path()
    if folder is None or not (folder / "infinity" / "models" / "infinity.py").is_file():
        raise FileNotFoundError(f"{VARIABLE} must name a folder that holds infinity/models/infinity.py, not {folder}")
    with _import_surroundings(folder):
        names = {"infinity": "infinity", "basic": "basic", "bsq": "bsq_vae.multiscale_bsq", "vae": "bsq_vae.vae"}
        names["correction"] = "bitwise_self_correction"
        loaded = {name: importlib.import_module(f"infinity.models.{path}") for name, path in names.items()}
    loaded["basic"].torch = _KeepFloat32()  # type: ignore[attr-defined]
    return types.SimpleNamespace(**loaded)


class FakeTokenizer:
    """What the published generation loop needs of a tokenizer; `decode` keeps the features, its image is grey."""

    def __init__(self, bits: int) -> None:
        self.embed_dim = self.codebook_dim = bits
        self.vocab_size = 2**bits
        self.quantizer = load().bsq.MultiScaleBSQ(
            dim=bits, codebook_size=2**bits, new_quant=True, schedule_mode="dynamic"
        )
        self.features: Tensor | None = None

    def decode(self, features: Tensor) -> Tensor:
        self.features = features
        return torch.zeros(features.shape[0], 3, 8, 8)


@dataclass
class OfficialRun:
    """What one published generation computed, per scale.

    blocks[s][i]: output of block i, `[R, L, D]`; logits[s]: `[B, L, 2 d]` after guidance and temperature; bits[s]:
    `[B, L, d]`, features: `[B, d, H, W]` (with patchify bits are `[B, L, 4 d]`).
    """

    blocks: list[list[Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0))


def build(config: Any, state: dict[str, Tensor], *, fused_norm: bool = True) -> nn.Module:
    """The published transformer with the shape of an `InfinityConfig` and the given weights."""
    code = load()
    tokenizer = FakeTokenizer(config.bits // 4 if config.patchify else config.bits)
    with contextlib.redirect_stdout(io.StringIO()):
        model = code.infinity.Infinity(
            vae_local=tokenizer,
            text_channels=config.text_dim,
            text_maxlen=config.text_maxlen,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            block_chunks=config.chunks,
            mlp_ratio=config.mlp_ratio,
            norm_eps=config.norm_eps,
            shared_aln=True,
            fused_norm=fused_norm,
            customized_flash_attn=False,
            use_flex_attn=False,
            pad_to_multiplier=128,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
            add_lvl_embeding_only_first_block=1,
            use_bit_label=1,
            pn="0.06M",
            inference_mode=True,
            raw_scale_schedule=None,
            drop_path_rate=0.1,
            checkpointing="full-block",
            train_h_div_w_list=[1.0],
            apply_spatial_patchify=int(config.patchify),
        ).eval()
    nn.Module.load_state_dict(model, state, strict=True)
    model.tokenizer_for_test = [tokenizer]  # in a list: not a submodule
    return model


def pack_text(hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int], Tensor, int]:
    """Padded text `[B, T, C]` as the published tuple (packed text, lengths, cumulated lengths, longest)."""
    lens = [int(n) for n in lengths]
    packed = torch.cat([row[:n] for row, n in zip(hidden, lens, strict=True)])
    cumulated = F.pad(torch.tensor(lens, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return packed, lens, cumulated, max(lens)


def encode_prompt(tokenizer: Any, encoder: Any, prompt: str) -> tuple[Tensor, list[int], Tensor, int]:
    """The published `encode_prompt` on the CPU; its file is not imported, as it needs CUDA and more packages."""
    folder = official_path()
    assert folder is not None
    tree = ast.parse((folder / "tools" / "run_infinity.py").read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "encode_prompt"]
    names: dict[str, Any] = {"F": F, "torch": torch, "List": list}
    exec(compile(ast.Module(wanted, []), "encode_prompt", "exec"), names)
    cuda = Tensor.cuda
    Tensor.cuda = lambda self, **_: self  # type: ignore[method-assign,assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            return names["encode_prompt"](tokenizer, encoder, prompt)
    finally:
        Tensor.cuda = cuda  # type: ignore[method-assign]


def published_bits(bits: Tensor, grid: tuple[int, int], patchify: bool) -> Tensor:
    """Token bits `[B, L, d]` in the published layout `[B, 1, h, w, d]` (on the twice finer grid with patchify)."""
    maps = bits.transpose(1, 2).reshape(bits.shape[0], -1, *grid)
    maps = F.pixel_shuffle(maps, 2) if patchify else maps
    return maps.permute(0, 2, 3, 1).unsqueeze(1)


def autoencoder(bits: int, base_channels: int, multipliers: Sequence[int]) -> nn.Module:
    """The published image tokenizer with fewer channels than its constructor allows."""
    code = load().vae
    full = code.AutoEncoder

    def narrow(args: Any) -> nn.Module:
        args.base_ch = base_channels
        return full(args)

    code.AutoEncoder = narrow
    try:
        levels = list(multipliers)
        size = 2 ** (len(levels) - 1)
        return code.vae_model(
            None, "dynamic", bits, 2**bits, patch_size=size, encoder_ch_mult=levels, decoder_ch_mult=levels
        )
    finally:
        code.AutoEncoder = full


def generate(
    model: nn.Module,
    scales: Sequence[tuple[int, int]],
    text: tuple[Tensor, list[int], Tensor, int],
    *,
    cfg: Sequence[float],
    tau: Sequence[float],
    negative: tuple[Tensor, list[int], Tensor, int] | None = None,
    insertion: Sequence[int] = (0,),
    forced: Sequence[Tensor] | None = None,
    patchify: bool = False,
) -> OfficialRun:
    """Run the published loop greedily (top-k 1), recording every block, the logits and the bits of every scale.

    forced: token bits `[B, L, d]` of the first scales, fed in place of the generated ones.
    """
    run, code, batch = OfficialRun(), load().infinity, len(text[1])
    tokenizer = model.tokenizer_for_test[0]
    blocks = model.unregistered_blocks

    def keep_block(module: nn.Module, _: Any, output: Tensor, index: int) -> None:
        if index == 0:
            run.blocks.append([])
        run.blocks[-1].append(output.detach().clone())

    sampler = code.sample_with_top_k_top_p_also_inplace_modifying_logits_

    def keep_logits(logits: Tensor, **options: Any) -> Tensor:
        tokens = scales[len(run.logits)][0] * scales[len(run.logits)][1]
        run.logits.append(logits.detach().clone().reshape(batch, tokens, -1))
        drawn = sampler(logits, **options)
        run.bits.append(drawn[:, :, 0].reshape(batch, tokens, -1))
        return drawn

    forced = list(forced or [])
    handles = [
        block.register_forward_hook(functools.partial(keep_block, index=index)) for index, block in enumerate(blocks)
    ]
    code.sample_with_top_k_top_p_also_inplace_modifying_logits_ = keep_logits
    try:
        model.autoregressive_infer_cfg(
            vae=tokenizer,
            scale_schedule=[(1, h, w) for h, w in scales],
            label_B_or_BLT=text,
            negative_label_B_or_BLT=negative,
            B=batch,
            g_seed=1,
            cfg_list=list(cfg),
            tau_list=list(tau),
            top_k=1,
            top_p=0.0,
            returns_vemb=1,
            vae_type=1,
            ret_img=True,
            inference_mode=True,
            cfg_insertion_layer=list(insertion),
            gt_leak=len(forced),
            gt_ls_Bl=[published_bits(b, grid, patchify) for b, grid in zip(forced, scales, strict=False)],
        )
    finally:
        code.sample_with_top_k_top_p_also_inplace_modifying_logits_ = sampler
        for handle in handles:
            handle.remove()
    run.features = tokenizer.features
    return run
