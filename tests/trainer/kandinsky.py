"""Tiny Kandinsky 2.2: a prior and a decoder built from config, their pipelines as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.configuration_clip import CLIPTextConfig

WIDTH, CLIP_SIDE = 32, 16


def vision_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=CLIP_SIDE,
            patch_size=8,
            projection_dim=WIDTH,
        )
    )


def prior_transformer() -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=77,
        additional_embeddings=4,
    )
    with torch.no_grad():  # zeros as they are made
        for parameter in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
            parameter.normal_(0, 0.2)
        prior.clip_std.uniform_(0.5, 1.5)
    return prior


def decoder_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def movq() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),  # its norms have 32 groups
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def save_prior(folder: Path, tokenizer: CLIPTokenizer, text_config: CLIPTextConfig) -> None:
    """A KandinskyV22PriorPipeline folder; text and picture embeddings are WIDTH wide."""
    torch.manual_seed(0)
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    KandinskyV22PriorPipeline(
        prior=prior_transformer(),
        image_encoder=vision_encoder(),
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        image_processor=CLIPImageProcessor(size={"shortest_edge": CLIP_SIDE}, crop_size=side),
    ).save_pretrained(folder)


def save_decoder(folder: Path, prior: Path) -> None:
    """A KandinskyV22Pipeline folder whose card names `prior`: 32x32 pictures, 16x16 latents, learned variance."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range", prediction_type="epsilon"
    )
    KandinskyV22Pipeline(unet=decoder_unet(), scheduler=scheduler, movq=movq()).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'prior': [str(prior)]})}---\n", encoding="utf-8")
