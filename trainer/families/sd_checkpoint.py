"""Stable Diffusion 1.x and XL as one file with the original program's keys, as A1111 and ComfyUI load checkpoints.

    model.diffusion_model.*                        the UNet
    first_stage_model.*                            the VAE
    cond_stage_model.transformer.*                 1.x: the text encoder
    conditioner.embedders.0.transformer.*, .1.model.*   XL: both, the second in OpenCLIP's layout

The names follow the nets' own structure and no table of block numbers, so that they hold for any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.artifact import save_tensors

AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IN_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
IN_OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save(path: Path, pipe: Any) -> None:
    """Write a StableDiffusionPipeline or StableDiffusionXLPipeline; UserError for 2.x and for added tokens."""
    state = {f"model.diffusion_model.{key}": value for key, value in unet_state(pipe.unet).items()}
    state |= {f"first_stage_model.{key}": value for key, value in vae_state(pipe.vae).items()}
    first = {_with_model(key): value for key, value in pipe.text_encoder.state_dict().items()}
    if hasattr(pipe, "text_encoder_2"):
        state |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in first.items()}
        second = openclip_state(pipe.text_encoder_2)
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    elif pipe.text_encoder.config.hidden_act != "quick_gelu":
        raise UserError(
            "a Stable Diffusion 2.x is not written as one file, since its text encoder lost a layer on the way to "
            "diffusers: leave single_file out, the folder is complete."
        )
    else:
        state |= {f"cond_stage_model.transformer.{key}": value for key, value in first.items()}
    save_tensors(path, state)


def unet_state(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet2DConditionModel's weights by their original names, without "model.diffusion_model."."""
    return {original_name(unet, key): value for key, value in unet.state_dict().items()}


def original_name(unet: nn.Module, key: str) -> str:
    """What a parameter or module of diffusers' UNet is called in the original one."""
    places = dict(AROUND)
    for ours, theirs in _blocks(unet):
        places[ours] = theirs
    prefix = max((place for place in places if key == place or key.startswith(f"{place}.")), key=len, default=None)
    if prefix is None:
        raise ValueError(f"the original UNet has no {key}")
    rest = key[len(prefix) :]
    if ".resnets." in prefix:
        rest = _renamed(rest, IN_RESNET)
    return places[prefix] + rest


def _blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Path of each part of the blocks in diffusers' UNet, and in the original, which numbers them all in a row."""
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _layer(f"down_blocks.{i}", j, f"input_blocks.{number}")
            number += 1
        if block.downsamplers is not None:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from (("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2"))
    yield "mid_block.attentions.0", "middle_block.1"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield from _layer(f"up_blocks.{i}", j, f"output_blocks.{number}")
            number += 1
        if block.upsamplers is not None:
            place = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _layer(ours: str, index: int, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.resnets.{index}", f"{theirs}.0"
    yield f"{ours}.attentions.{index}", f"{theirs}.1"


def vae_state(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKL's weights by their original names, without "first_stage_model."."""
    last = len(vae.decoder.up_blocks) - 1
    state = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"(encoder)\.down_blocks\.(\d+)\.resnets", r"\1.down.\2.block", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = _renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), IN_VAE_ATTENTION)
            value = value[:, :, None, None] if value.dim() == 2 else value  # 1x1 convolutions there
        state[name] = value
    return state


def openclip_state(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection's weights by OpenCLIP's names: query, key and value are one matrix there."""
    own = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    state = {}
    for key, value in own.items():
        if key == "text_projection.weight":
            state["text_projection"] = value.T.contiguous()
        elif key == "embeddings.position_embedding.weight":
            state["positional_embedding"] = value
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            parts = [own[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            state[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj|position_ids", key):
            state[_renamed(key, IN_OPENCLIP)] = value
    return state


def _with_model(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _renamed(name: str, table: dict[str, str]) -> str:
    """Every whole part of a dotted name that the table has, as it has it."""
    for ours, theirs in table.items():
        name = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, name)
    return name
