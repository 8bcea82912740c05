"""Parts of tiny Stable Diffusion models, built from config; other tiny models take some of them."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer

SIDE = 32  # of a picture


def tiny_tokenizer() -> CLIPTokenizer:
    """Bytes only, so that any text tokenises."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def tiny_text_config(tokenizer: CLIPTokenizer, **changes: object) -> CLIPTextConfig:
    # eos_token_id 2 as in the published SD and SDXL configs, which makes old code pool at the largest id
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return CLIPTextConfig(**(values | changes))


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    values = {
        "sample_size": SIDE // 2,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(values | changes))
