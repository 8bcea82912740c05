"""Names at true size: every layer of SD 1.5 and SDXL as published kohya files call it, there and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from preprocessing.errors import UserError
from trainer import kohya
from trainer.adapter_keys import layers, read_adapter
from trainer.families import sd_checkpoint
from trainer.families.base import DENOISER, TEXT, Net
from trainer.families.stable_diffusion import StableDiffusion, StableDiffusionXL

GOLDEN = Path(__file__).parent / "golden"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class TrueSize:
    """The nets of a family at their true size, without memory."""

    family: type[StableDiffusion]
    parts: dict[str, nn.Module]

    @property
    def nets(self) -> list[Net]:
        return [Net(name, DENOISER if name == "unet" else TEXT, {}) for name in self.parts]

    def module(self, name: str) -> nn.Module:
        return self.parts[name]

    def own_keys(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def every_layer(self) -> dict[str, torch.Tensor]:
        """LoRA of rank 2 on every layer that a kohya file may adapt."""
        state = {}
        for net, module in self.parts.items():
            for name, layer in layers(module).items():
                state |= lora_of(f"{net}.{name}", layer.weight.shape)
        return state


def lora_of(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        down = torch.empty(2, *shape[1:])
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.empty(shape[0], 2, *[1] * len(shape[2:]))}


@pytest.fixture(scope="module")
def sd15() -> TrueSize:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        return TrueSize(StableDiffusion, {"unet": unet, "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L))})


@pytest.fixture(scope="module")
def sdxl() -> TrueSize:
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**SDXL),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
        }
        return TrueSize(StableDiffusionXL, parts)


def expanded(text: str) -> Iterator[str]:
    """`a{b,c{0-1}}` -> ab, ac0, ac1."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        yield text
        return
    start = text.index("{")
    depth, end = 0, start
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            break
    inside, rest = text[start + 1 : end], text[end + 1 :]
    for choice in alternatives(inside):
        for middle in expanded(choice):
            for tail in expanded(rest):
                yield text[:start] + middle + tail


def alternatives(inside: str) -> list[str]:
    if found := re.fullmatch(r"(\d+)-(\d+)", inside):
        return [str(i) for i in range(int(found[1]), int(found[2]) + 1)]
    parts, depth = [""], 0
    for letter in inside:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def golden(name: str) -> list[list[str]]:
    """Rows of names: as we write it, and kohya's own where there is another."""
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("#"):
            rows += [list(row) for row in zip(*(expanded(column) for column in line.split()), strict=True)]
    return rows


def exported(model: TrueSize) -> dict[str, str]:
    """kohya's name of each layer -> ours."""
    state = model.every_layer()
    nets = {net: {"lora_alpha": 2} for net in model.parts}
    two = len(model.family.towers) == 2
    found = {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            (name,) = {one.partition(".")[0] for one in kohya.to_kohya({key: state[key]}, nets, two)}
            assert name not in found
            found[name] = key.removesuffix(".lora_A.weight")
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_layer_has_its_published_name(name, request) -> None:
    model = request.getfixturevalue(name)
    assert sorted(exported(model)) == sorted(row[0] for row in golden(name))


@pytest.mark.parametrize(("name", "unet", "text"), [("sd15", 192, [72]), ("sdxl", 722, [72, 192])])
def test_as_many_modules_as_kohyas_trainer_reports(name, unet, text) -> None:
    """Its log says how many it creates: the attention blocks of the UNet, and the text encoders' layers."""
    names = [row[0] for row in golden(name)]
    assert sum("_attentions_" in one for one in names) == unet
    prefixes = ["lora_te_"] if len(text) == 1 else ["lora_te1_", "lora_te2_"]
    assert [sum(one.startswith(prefix + "text_model") for one in names) for prefix in prefixes] == text


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_there_and_back(name, request) -> None:
    """ours -> kohya -> ours, and ours -> ours (diffusers' keys), at the true size."""
    model = request.getfixturevalue(name)
    state = model.every_layer()
    nets = {net: {"lora_alpha": 2, "r": 2} for net in model.parts}
    converted = kohya.to_kohya(state, nets, len(model.family.towers) == 2)
    for given in (converted, state):
        given = {key: value.to("meta") if "alpha" not in key else value for key, value in given.items()}
        found = read_adapter(given, {}, {}, model)
        assert {key: value.shape for key, value in found.tensors.items()} == {k: v.shape for k, v in state.items()}


def test_kohyas_original_names_of_sdxl_are_read(sdxl) -> None:
    """Each of them finds the layer that the other column names."""
    ours, state = exported(sdxl), sdxl.every_layer()
    given, wanted = {}, {}
    for row in golden("sdxl"):
        if len(row) == 2:
            layer = ours[row[0]]
            given |= {f"{row[1]}.lora_down.weight": state[f"{layer}.lora_A.weight"]}
            given |= {f"{row[1]}.lora_up.weight": state[f"{layer}.lora_B.weight"]}
            wanted[layer] = row[1]
    found = read_adapter(given, {}, {}, sdxl)
    assert {key.rpartition(".lora_")[0] for key in found.tensors} == set(wanted)
    for key, value in found.tensors.items():
        assert value.shape == state[key].shape
    # one at a time, so that no two have changed places
    for layer in (one for one in wanted if one.endswith(("to_q", "conv1", "conv", "conv_shortcut", "proj_out"))):
        pair = {key: value for key, value in given.items() if key.partition(".")[0] == wanted[layer]}
        assert {key.rpartition(".lora_")[0] for key in read_adapter(pair, {}, {}, sdxl).tensors} == {layer}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_original_unet_names_are_those_that_diffusers_reads(name, request) -> None:
    """Our names of a checkpoint's tensors, read by diffusers' own converter, are the UNet's again."""
    unet = request.getfixturevalue(name).module("unet")
    state = {f"model.diffusion_model.{key}": value for key, value in sd_checkpoint.unet_state(unet).items()}
    found = single_file_utils.convert_ldm_unet_checkpoint(state, unet.config)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in unet.state_dict().items()}


def test_original_vae_names_are_those_that_diffusers_reads() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    state = {f"first_stage_model.{key}": value for key, value in sd_checkpoint.vae_state(vae).items()}
    found = single_file_utils.convert_ldm_vae_checkpoint(state, vae.config)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in vae.state_dict().items()}


def test_published_original_names(sdxl) -> None:
    """Known from published checkpoints."""
    unet = sdxl.module("unet")
    for ours, theirs in {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "add_embedding.linear_2": "label_emb.0.2",
    }.items():
        assert sd_checkpoint.original_name(unet, ours) == theirs


def test_an_unknown_name_is_told_with_the_nearest_known_one(sd15) -> None:
    wrong = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_qq"
    tensors = {f"{wrong}.lora_{part}.weight": torch.empty(2, 2) for part in ("down", "up")}
    with pytest.raises(UserError, match=r"attn1_to_qq\.lora_down\.weight \(nearest: .*attn1_to_q\.lora_down"):
        read_adapter(tensors, {}, {}, sd15)
    with pytest.raises(UserError, match=r"\(nearest: unet\.conv_in\)"):
        read_adapter({"unet.conv_inn.lora_A.weight": torch.empty(2, 2)}, {}, {}, sd15)
