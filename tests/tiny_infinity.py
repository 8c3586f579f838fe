"""A small Infinity pipeline with random weights, and a model with the interface of the published code around it."""

from typing import Any

import torch
from torch import nn

from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.models.infinity.transformer import Infinity

SCALES = ((1, 1), (2, 2), (4, 4))
DEPTH, WIDTH, TEXT_WIDTH = 3, 32, 24


class Pixels(nn.Module):
    """Stands for an image tokenizer: the features are the image."""

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3].tanh()


def tiny_pipeline(seed: int = 0) -> InfinityPipeline:
    """Three layers, three scales, a two-layer T5 encoder with the words of the shapes captions."""
    from transformers import T5Config, T5EncoderModel

    from pysteer.zoo.shapes.captions import build_text_tokenizer, vocabulary

    torch.manual_seed(seed)
    config = InfinityConfig(
        depth=DEPTH, dim=WIDTH, heads=2, bits=4, scales=SCALES, mlp_ratio=8, text_dim=TEXT_WIDTH, text_maxlen=20,
        text_heads=2, max_scales=4,
    )  # fmt: skip
    transformer = Infinity(config)
    with torch.no_grad():  # untrained gates are near zero; these let every part matter
        for block in transformer.blocks:
            block.ada_gss[:, :, :2].add_(1.0)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary()), d_model=TEXT_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=3,
            dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip
    defaults = {"cfg": 2.0, "tau": 0.5}
    return InfinityPipeline(transformer, Pixels(), encoder, build_text_tokenizer(), defaults)


class Published(nn.Module):
    """The interface of the published model around the port's blocks: module tree, call arguments, no clock.

    `autoregressive_infer_cfg` walks the scales with its own loop; images are not sampled, the first bits are fed on.
    """

    def __init__(self, port: Infinity) -> None:
        super().__init__()
        self.block_chunks = port.block_chunks
        self.unregistered_blocks = [_Block(block) for block in port.blocks]
        for chunk in range(len(self.block_chunks)):
            self.block_chunks[chunk].module = nn.ModuleList(self.unregistered_blocks)
        self.text_proj_for_sos = port.text_proj_for_sos
        self.pos_start = port.pos_start
        self.lvl_embed = port.lvl_embed
        self._port = [port]

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, vae: Any = None, scale_schedule: Any = None, label_B_or_BLT: Any = None, B: int = 1, cfg_list: Any = ()
    ) -> list[torch.Tensor]:
        port, text = self._port[0], label_B_or_BLT
        if any(factor != 1 for factor in cfg_list):
            text = type(text).cat([text, port.unconditional(text)])
        condition = port.condition(text)
        rows = len(text.lengths)
        caches = port.new_caches(rows, sum(h * w for _, h, w in scale_schedule))
        rope, x, start, outputs = port.rope([(h, w) for _, h, w in scale_schedule]), port.first_input(condition), 0, []
        for si, (_, h, w) in enumerate(scale_schedule):
            x = x + self.lvl_embed.weight[si]
            for i, block in enumerate(self.unregistered_blocks):
                arguments = (condition.modulation, condition.keys_values[i], condition.mask)
                x = block(x=x, scale_ind=si, rest=(*arguments, rope[:, start : start + h * w], caches[i], start))
            outputs.append(x)
            start += h * w
            if si + 1 < len(scale_schedule):
                following = scale_schedule[si + 1][1] * scale_schedule[si + 1][2]
                x = x.mean(1, keepdim=True).expand(-1, following, -1)
        return outputs


class _Block(nn.Module):
    """A block that is called with keywords, as the published one is."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.sa, self.ca, self.ffn, self.ca_norm = block.sa, block.ca, block.ffn, block.ca_norm
        self._block = [block]

    def forward(self, x: torch.Tensor, scale_ind: int, rest: tuple[Any, ...]) -> torch.Tensor:
        return self._block[0](x, *rest)
