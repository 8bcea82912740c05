"""A tiny OmniGen2 built from config, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.trainer.tiny import tiny_vae
from trainer.families.omnigen2.transformer import OmniGen2Transformer2DModel

WIDTH = 32  # of the language model
INDEX = {
    "_class_name": "OmniGen2Pipeline",
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["scheduling_flow_match_euler_discrete_time_shifting", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes only, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def tiny_transformer(**changes: object) -> OmniGen2Transformer2DModel:
    """Heads of 12 numbers, two of them sharing keys; random everywhere, where training would start with zeros."""
    torch.manual_seed(0)
    values = {
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4),
        "text_feat_dim": WIDTH,
        "timestep_scale": 1000.0,
    }
    return OmniGen2Transformer2DModel(**(values | changes)).eval()


def tiny_mllm(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def save_tiny(folder: Path) -> None:
    """An OmniGen2Pipeline folder: 32x32 pictures, 16x16 latents of 4 channels."""
    torch.manual_seed(0)
    vae, tokenizer = tiny_vae(), tiny_qwen_tokenizer()
    vae.register_to_config(shift_factor=0.12, scaling_factor=0.36)
    tiny_transformer().save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    tiny_mllm(tokenizer).save_pretrained(folder / "mllm")
    tokenizer.save_pretrained(folder / "processor")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "dynamic_time_shift": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
