"""Tiny random pipelines of current diffusion transformers, given encoded prompts instead of a text encoder."""

import diffusers as df
import torch
from tiny_diffusion import WIDTH, quiet, qwen, sana, tokens, vae


def flow():
    return df.FlowMatchEulerDiscreteScheduler()


def sana_pipeline():
    pipe = df.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=dc_autoencoder(), transformer=sana(), scheduler=flow()
    )
    return quiet(pipe)


def dc_autoencoder():
    torch.manual_seed(11)
    return df.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate",
        downsample_block_type="stride_conv", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    ).eval()  # fmt: skip


def qwen_pipeline():
    torch.manual_seed(12)
    coder = df.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = df.QwenImagePipeline(tokenizer=None, text_encoder=None, vae=coder, transformer=qwen(), scheduler=flow())
    return quiet(pipe)


def chroma_pipeline():
    torch.manual_seed(13)
    model = df.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(2, 2, 4), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=8,
    ).eval()  # fmt: skip
    return quiet(df.ChromaPipeline(flow(), vae(), None, None, model))


def lumina_pipeline():
    torch.manual_seed(14)
    model = df.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
        cap_feat_dim=WIDTH,
    ).eval()  # fmt: skip
    return quiet(df.Lumina2Pipeline(model, flow(), vae(), None, None))


def z_image_pipeline():
    torch.manual_seed(15)
    model = df.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=4,
        n_kv_heads=4, cap_feat_dim=WIDTH, axes_dims=[4, 2, 2], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    return quiet(df.ZImagePipeline(flow(), vae(), None, None, model))


def encoded(kind: str, seed: int, count: int = 2, length: int = 8):
    """Encoded prompts and what goes along, by the names of the arguments of the call."""
    text = tokens(count, length, WIDTH, seed)
    if kind == "z_image":
        return {"prompt_embeds": list(text)}
    if kind == "chroma":
        return {"prompt_embeds": text, "prompt_attention_mask": torch.ones(count, length)}
    if kind == "qwen":
        return {"prompt_embeds": text, "prompt_embeds_mask": torch.ones(count, length, dtype=torch.long)}
    return {"prompt_embeds": text, "prompt_attention_mask": torch.ones(count, length, dtype=torch.bool)}


PIPELINES = {
    "sana": sana_pipeline, "qwen": qwen_pipeline, "chroma": chroma_pipeline, "lumina": lumina_pipeline,
    "z_image": z_image_pipeline,
}  # fmt: skip
