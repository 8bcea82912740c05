"""A tiny FLUX built from config, in the shapes of dev and schnell."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Letters of ASCII only."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [("▁", -3.0), *((chr(code), -4.0) for code in range(33, 127))]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=48)


def tiny_pipeline(guided: bool, clip: tuple[CLIPTokenizer, CLIPTextModel], vae: AutoencoderKL) -> FluxPipeline:
    """A FluxPipeline around a VAE and CLIP; shift and dynamic shifting as dev's where `guided`."""
    tokenizer_2 = tiny_t5_tokenizer()
    vae.register_to_config(shift_factor=0.12, scaling_factor=0.36)
    t5 = T5Config(
        vocab_size=len(tokenizer_2) + 5,  # padded, as the published one is
        d_model=24,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return FluxPipeline(
        vae=vae,
        text_encoder=clip[1],
        tokenizer=clip[0],
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer_2,
        transformer=tiny_transformer(guided),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
    )


def tiny_transformer(guided: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
