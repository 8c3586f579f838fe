"""Tiny random diffusers models and pipelines, a shift at one of their sites, and the plain way to steer: a hook."""

import diffusers as df
import torch
import transformers as tf
from torch import Tensor, nn

from pysteer.steering import SiteParameters

WIDTH, LAYERS, SIDE = 32, 2, 8
WORDS = ["a", "red", "blue", "circle", "square", "ugly", "blurry", "of", "the", "two"]


def clip_tokenizer(length: int = 8) -> tf.CLIPTokenizer:
    pieces = ["<|startoftext|>", "<|endoftext|>", *sorted({letter for word in WORDS for letter in word})]
    pieces += [f"{piece}</w>" for piece in pieces[2:]]
    tokenizer = tf.CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.model_max_length = length * 2
    return tokenizer


def t5_tokenizer() -> tf.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return tf.T5Tokenizer(vocab=pieces, extra_ids=0)


def clip_encoder(projected: bool = False, seed: int = 1):
    torch.manual_seed(seed)
    config = tf.CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel)(config).eval()


def t5_encoder():
    torch.manual_seed(2)
    config = tf.T5Config(vocab_size=16, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return tf.T5EncoderModel(config).eval()


def vae(channels: int = 4):
    torch.manual_seed(3)
    return df.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(16,),
        latent_channels=channels, norm_num_groups=4, layers_per_block=1, sample_size=SIDE,
    ).eval()  # fmt: skip


def unet(**more):
    torch.manual_seed(4)
    settings = {
        "sample_size": SIDE, "block_out_channels": (WIDTH, WIDTH), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    return df.UNet2DConditionModel(**{**settings, **more}).eval()


def sdxl_unet():
    return unet(
        use_linear_projection=True, transformer_layers_per_block=2, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH, cross_attention_dim=2 * WIDTH,
    )  # fmt: skip


def flux(guided: bool = False):
    torch.manual_seed(5)
    return df.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), guidance_embeds=guided,
    ).eval()  # fmt: skip


def sd3():
    torch.manual_seed(6)
    return df.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def pixart():
    torch.manual_seed(7)
    return df.PixArtTransformer2DModel(
        sample_size=SIDE, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=WIDTH, out_channels=8, caption_channels=WIDTH, use_additional_conditions=False,
    ).eval()  # fmt: skip


def sana():
    torch.manual_seed(8)
    return df.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=SIDE,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=WIDTH, caption_channels=WIDTH,
        patch_size=1,
    ).eval()  # fmt: skip


def qwen():
    torch.manual_seed(9)
    return df.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def tokens(rows: int, length: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, rows: int = 2) -> dict:
    """Arguments for a call of the denoiser `name`."""
    image, text = tokens(rows, 4, SIDE * SIDE, 1).view(rows, 4, SIDE, SIDE), tokens(rows, 5, WIDTH, 2)
    packed, time = tokens(rows, 16, 16, 1), torch.full((rows,), 500.0)
    if name == "unet":
        return {"sample": image, "timestep": torch.tensor(500), "encoder_hidden_states": text}
    if name == "sdxl_unet":
        added = {"text_embeds": text[:, 0], "time_ids": torch.arange(6.0).repeat(rows, 1)}
        both = {"encoder_hidden_states": torch.cat((text, text), -1), "added_cond_kwargs": added}
        return {"sample": image, "timestep": torch.tensor(500), **both}
    if name == "flux":
        ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.arange(16.0)[:, None].expand(-1, 3)}
        known = {"encoder_hidden_states": text, "pooled_projections": text[:, 0], "timestep": time / 1000}
        return {"hidden_states": packed, **known, **ids}
    if name == "sd3":
        both = torch.cat((text, text), -1)
        return {
            "hidden_states": image,
            "encoder_hidden_states": both,
            "pooled_projections": both[:, 0],
            "timestep": time,
        }
    if name == "qwen":
        mask = torch.ones(rows, 5, dtype=torch.bool)
        shapes = {"img_shapes": [[(1, 4, 4)]] * rows, "encoder_hidden_states_mask": mask}
        return {"hidden_states": packed, "encoder_hidden_states": text, "timestep": time / 1000, **shapes}
    return {"hidden_states": image, "encoder_hidden_states": text, "timestep": time}


DENOISERS = {
    "unet": unet, "sdxl_unet": sdxl_unet, "flux": flux, "sd3": sd3, "pixart": pixart, "sana": sana, "qwen": qwen,
}  # fmt: skip


def out(model, name: str, rows: int = 2, **more) -> Tensor:
    with torch.no_grad():
        return model(**{**inputs(name, rows), **more}, return_dict=False)[0]


def stable_diffusion(scheduler=None, **more):
    pipe = df.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(), unet=unet(**more),
        scheduler=scheduler or df.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipe)


def sdxl_pipeline():
    pipe = df.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_encoder(), text_encoder_2=clip_encoder(True, 10), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=sdxl_unet(), scheduler=df.EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    return quiet(pipe)


def flux_pipeline(guided: bool = False, scheduler=None):
    pipe = df.FluxPipeline(
        scheduler=scheduler or df.FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(), transformer=flux(guided),
    )  # fmt: skip
    return quiet(pipe)


def sd3_pipeline():
    pipe = df.StableDiffusion3Pipeline(
        transformer=sd3(), scheduler=df.FlowMatchEulerDiscreteScheduler(), vae=vae(),
        text_encoder=clip_encoder(True), tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(True, 10),
        tokenizer_2=clip_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return quiet(pipe)


def pixart_pipeline():
    pipe = df.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae(), transformer=pixart(),
        scheduler=df.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    return quiet(pipe)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shift(site: str, width: int = WIDTH, seed: int = 0, steps: tuple[int, ...] | None = None) -> SiteParameters:
    generator = torch.Generator().manual_seed(seed)
    sets = 1 if steps is None else len(steps)
    gain = 1 + 0.3 * torch.randn(sets, width, generator=generator)
    return SiteParameters(
        site, "affine_shift", steps, {"gain": gain, "bias": torch.randn(sets, width, generator=generator)}
    )


class Plain:
    """The plain way: a forward hook that applies the formula of `affine_shift` to the rows and calls chosen.

    Args:
        chosen: strength of every row, given the number of rows and how often the module ran before.
        replace: replace `forward` instead: transformers notes hidden states before other hooks see them.
    """

    def __init__(
        self, module: nn.Module, parameters: SiteParameters, element, layout: str, chosen=None, replace=False
    ) -> None:
        self.gain, self.bias = parameters.tensors["gain"][0], parameters.tensors["bias"][0]
        self.element, self.layout, self.calls = element, layout, 0
        self.chosen = chosen or (lambda rows, call: torch.ones(rows))
        self.module, self.hook = module, None if replace else module.register_forward_hook(self)
        if replace:
            forward = module.forward
            module.forward = lambda *args, **kwargs: self(module, args, forward(*args, **kwargs))

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *exception) -> None:
        if self.hook is None:
            del self.module.forward
        else:
            self.hook.remove()

    def __call__(self, module, args, output):
        if isinstance(output, Tensor):
            return self.moved(output)
        if isinstance(output, dict):
            return type(output)(**{**output, "sample": self.moved(output["sample"])})
        items = list(output)
        items[self.element] = self.moved(items[self.element])
        return tuple(items)

    def moved(self, x: Tensor) -> Tensor:
        gain, bias = self.gain, self.bias
        if self.layout == "channels":
            gain, bias = (v.view(-1, *[1] * (x.dim() - 2)) for v in (gain, bias))
        strength = self.chosen(len(x), self.calls).view(-1, *[1] * (x.dim() - 1))
        self.calls += 1
        return x + strength * ((gain - 1) * x + bias)
