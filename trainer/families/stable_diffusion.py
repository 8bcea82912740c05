"""Stable Diffusion 1.x, 2.x and XL: they differ in their conditioning only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor

from trainer import kohya
from trainer.artifact import Manifest
from trainer.families import model_config, resolve, sd_checkpoint
from trainer.families.base import DENOISER, IMAGE_TO_IMAGE, INPAINT, TEXT, TEXT_TO_IMAGE, Geometry, Net
from trainer.families.pipeline_family import PipelineFamily
from trainer.objectives import Ddpm
from trainer.samples import Conditioning, Picture

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")
UNET_TARGETS = {
    "attention": ATTENTION,
    "attention_conv": ATTENTION + CONVOLUTIONS,
    "all": (*ATTENTION, *CONVOLUTIONS, "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
}
TEXT_TARGETS = dict.fromkeys(UNET_TARGETS, ("q_proj", "k_proj", "v_proj", "out_proj"))


class StableDiffusion(PipelineFamily):
    """Stable Diffusion 1.x and 2.x."""

    name: ClassVar[str] = "stable_diffusion"
    usual: ClassVar[Geometry] = Geometry(stride=64, resolution=512)
    denoiser: ClassVar[str] = "unet"
    pipelines: ClassVar[dict[str, str]] = {
        TEXT_TO_IMAGE: "StableDiffusionPipeline",
        IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
        INPAINT: "StableDiffusionInpaintPipeline",
    }
    pipeline_options: ClassVar[dict[str, Any]] = {"requires_safety_checker": False}
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (("tokenizer", "text_encoder", "clip_l"),)
    text_layers: ClassVar[tuple[str, str] | None] = ("attn2.to_k", "attn2.to_v")
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {"clip_l": ("emb_params", "string_to_param.*")}
    own_settings: ClassVar[tuple[str, ...]] = ("token_attention_penalty",)
    ui_adapters: ClassVar[tuple[str, ...]] = ("lora", "lokr")
    card_tags: ClassVar[tuple[str, ...]] = ("stable-diffusion", "stable-diffusion-diffusers")
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": {
            "max_train_steps": 800,
            "train_batch_size": 4,
            "lora_rank": 16,
            "lora_targets": "attention",
            "learning_rate": 3e-4,
            "text_embedding_lr": 1e-3,
            "preservation_weight": 0.0,
        },
        "full": {"learning_rate": 1e-5},
        "prefix": {"learning_rate": 1e-4},
        "perfusion": {"learning_rate": 0.03, "text_embedding_lr": 0.006},
    }

    def __init__(self, pipe: Any, dtype: torch.dtype):
        super().__init__(pipe, dtype)
        self.objective = Ddpm(DDPMScheduler.from_config(pipe.scheduler.config))
        self.nets = (Net("unet", DENOISER, UNET_TARGETS), *(Net(t[1], TEXT, TEXT_TARGETS) for t in self.towers))

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        if Path(resolve(source)).is_file():
            return cls.usual
        unet, vae = (model_config(source, part) for part in ("unet", "vae"))
        per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry(per_latent * 2 ** (len(unet["block_out_channels"]) - 1), per_latent * unet["sample_size"])

    @classmethod
    def _unused(cls) -> dict[str, None]:
        return super()._unused() | {"safety_checker": None}

    def encode_text(self, captions: list[str]) -> Conditioning:
        (tower,) = self.text
        return {"context": tower.encoder(self._tokens(tower, captions)).last_hidden_state}

    def attended(self, captions: list[str], tokens: Sequence[str]) -> tuple[list[Attention], Tensor]:
        layers = [layer for layer in self._pipe.unet.modules() if isinstance(layer, Attention)]
        tower = self.text[0]  # the second one's tokenizer parts a text alike
        ids = torch.tensor(tower.tokenizer.convert_tokens_to_ids(list(tokens)), device=self.device)
        return [one for one in layers if one.is_cross_attention], torch.isin(self._tokens(tower, captions), ids)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._pipe.unet(
            noisy.to(self.dtype),
            self.objective.timesteps(t),
            encoder_hidden_states=conditioning["context"].to(self.dtype),
            added_cond_kwargs=self._added(conditioning),
        ).sample.float()

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": conditioning["context"], "negative_prompt_embeds": negative["context"]}

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        kohya.save(path, tensors, manifest, len(self.towers) == 2, self.objective.scheduler.config.prediction_type)

    def save_single_file(self, path: Path) -> None:
        sd_checkpoint.save(path, self._pipe)

    def describe(self) -> dict[str, str]:
        return {"prediction_type": self.objective.scheduler.config.prediction_type}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, pooled text, sizes and crop."""

    name: ClassVar[str] = "stable_diffusion_xl"
    usual: ClassVar[Geometry] = Geometry(stride=32, resolution=1024)
    pipelines: ClassVar[dict[str, str]] = {
        TEXT_TO_IMAGE: "StableDiffusionXLPipeline",
        IMAGE_TO_IMAGE: "StableDiffusionXLImg2ImgPipeline",
        INPAINT: "StableDiffusionXLInpaintPipeline",
    }
    pipeline_options: ClassVar[dict[str, Any]] = {}
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("tokenizer", "text_encoder", "clip_l"),
        ("tokenizer_2", "text_encoder_2", "clip_g"),
    )
    pooled: ClassVar[str | None] = "text_encoder_2"
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {
        "clip_l": ("clip_l", "clip_l"),
        "clip_g": ("clip_g", "clip_g"),
    }
    card_tags: ClassVar[tuple[str, ...]] = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": StableDiffusion.recommended["any"] | {"train_batch_size": 2},
        "full": {"learning_rate": 4e-6},
        "prefix": {"learning_rate": 1e-4},
        "perfusion": {"learning_rate": 0.03, "text_embedding_lr": 0.006},
    }

    @classmethod
    def _unused(cls) -> dict[str, None]:
        return {"feature_extractor": None, "image_encoder": None}

    def _picture_conditioning(self, picture: Picture) -> Conditioning:
        target = tuple(picture.pixels.shape[-2:])
        return {"time_ids": torch.tensor([*picture.original_size, *picture.crop, *target], dtype=torch.float32)}

    def encode_text(self, captions: list[str]) -> Conditioning:
        hidden = []
        for tower in self.text:
            output = tower.encoder(self._tokens(tower, captions), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return {"context": torch.cat(hidden, dim=-1), "pooled": output.text_embeds}

    def null_conditioning(self) -> Conditioning:
        conditioning = self.encode_text([""])
        if self._pipe.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in conditioning.items()}
        return conditioning

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor]:
        return {"text_embeds": conditioning["pooled"].to(self.dtype), "time_ids": conditioning["time_ids"]}

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        pooled = {"pooled_prompt_embeds": conditioning["pooled"], "negative_pooled_prompt_embeds": negative["pooled"]}
        return super().pipeline_inputs(conditioning, negative) | pooled
