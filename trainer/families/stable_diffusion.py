"""Stable Diffusion 1.x, 2.x and XL: they differ in their conditioning only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import kohya
from trainer.artifact import EMBEDDINGS, Manifest
from trainer.families import model_config, resolve, sd_checkpoint
from trainer.families.base import (
    DENOISER,
    IMAGE_TO_IMAGE,
    INPAINT,
    TEXT,
    TEXT_TO_IMAGE,
    VAE,
    Family,
    Geometry,
    Net,
    TextTower,
)
from trainer.families.quiet import quietly
from trainer.objectives import Ddpm
from trainer.samples import Conditioning, Picture, Sample

if TYPE_CHECKING:
    from trainer.model_card import Place

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")
UNET_TARGETS = {
    "attention": ATTENTION,
    "attention_conv": ATTENTION + CONVOLUTIONS,
    "all": (*ATTENTION, *CONVOLUTIONS, "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
}
TEXT_TARGETS = dict.fromkeys(UNET_TARGETS, ("q_proj", "k_proj", "v_proj", "out_proj"))
PARTS = {
    DENOISER: ("unet",),
    TEXT: ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    VAE: ("vae",),
}


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name: ClassVar[str] = "stable_diffusion"
    usual: ClassVar[Geometry] = Geometry(stride=64, resolution=512)
    pipelines: ClassVar[dict[str, str]] = {
        TEXT_TO_IMAGE: "StableDiffusionPipeline",
        IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
        INPAINT: "StableDiffusionInpaintPipeline",
    }
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (("tokenizer", "text_encoder", "clip_l"),)
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {"clip_l": ("emb_params", "string_to_param.*")}
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
    }

    def __init__(self, pipe: Any, dtype: torch.dtype):
        self._pipe = pipe
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.objective = Ddpm(DDPMScheduler.from_config(pipe.scheduler.config))
        self.nets = (Net("unet", DENOISER, UNET_TARGETS), *(Net(t[1], TEXT, TEXT_TARGETS) for t in self.towers))
        for module in self._modules():
            module.requires_grad_(False).eval()
        for tower in self.text:
            find_end_by_id(tower)

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        if Path(resolve(source)).is_file():
            return cls.usual
        unet, vae = (model_config(source, part) for part in ("unet", "vae"))
        per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry(per_latent * 2 ** (len(unet["block_out_channels"]) - 1), per_latent * unet["sample_size"])

    @classmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype) -> StableDiffusion:
        pipeline_class = getattr(diffusers, cls.pipelines[TEXT_TO_IMAGE])
        path = Path(resolve(source))
        left_out = {name: None for part, names in PARTS.items() if part not in parts for name in names}
        try:
            with quietly():
                if path.is_file():
                    pipe = pipeline_class.from_single_file(str(path), torch_dtype=dtype, **left_out)
                else:
                    known = pipeline_class._get_signature_keys(pipeline_class)[0]
                    left_out = {name: None for name in left_out if name in known}
                    # the VAE in fp32: fp16 overflows in XL's decoder, and bf16 costs visible detail
                    dtypes = {"vae": torch.float32, "default": dtype}
                    pipe = pipeline_class.from_pretrained(str(path), dtype=dtypes, **left_out, **cls._unused())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"base_model {path} could not be read ({str(error).splitlines()[0]}): download or copy it again."
            ) from error
        return cls(pipe, dtype)

    @classmethod
    def _unused(cls) -> dict[str, None]:
        return {"safety_checker": None, "feature_extractor": None, "image_encoder": None}

    def _modules(self) -> list[nn.Module]:
        return [part for part in self._pipe.components.values() if isinstance(part, nn.Module)]

    def module(self, name: str) -> nn.Module:
        return getattr(self._pipe, name)

    def to(self, device: torch.device) -> StableDiffusion:
        for module in self._modules():
            module.to(device)
        self.device = device
        return self

    def free(self, part: str) -> None:
        from diffusers.training_utils import free_memory

        for name in PARTS[part]:
            if name in self._pipe.components:
                setattr(self._pipe, name, None)
        free_memory()

    @property
    def text(self) -> list[TextTower]:
        towers = [(getattr(self._pipe, a), getattr(self._pipe, b), b, c) for a, b, c in self.towers]
        return [TextTower(*tower) for tower in towers if tower[1] is not None]

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        (name,) = (tower[0] for tower in self.towers if tower[1] == encoder_name)
        setattr(self._pipe, name, tokenizer)

    @torch.no_grad()
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        vae = self._pipe.vae
        pixels = torch.stack([picture.pixels for picture in pictures]).to(self.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        scale = vae.config.scaling_factor
        samples = []
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            mean, std = posterior.mean[i].float() * scale, posterior.std[i].float() * scale
            mask = None if picture.mask is None else nn.functional.adaptive_avg_pool2d(picture.mask, mean.shape[-2:])
            samples.append(Sample(mean.cpu(), std.cpu(), caption, mask, self._picture_conditioning(picture)))
        return samples

    def _picture_conditioning(self, picture: Picture) -> Conditioning:
        """Conditioning that comes from the picture's geometry."""
        return {}

    def _tokens(self, tower: TextTower, captions: list[str]) -> Tensor:
        return tower.tokenizer(
            # a merged model's trigger, which stands for several tokens
            self._pipe.maybe_convert_prompt(captions, tower.tokenizer),
            padding="max_length",
            max_length=tower.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)

    def encode_text(self, captions: list[str]) -> Conditioning:
        (tower,) = self.text
        return {"context": tower.encoder(self._tokens(tower, captions)).last_hidden_state}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._pipe.unet(
            noisy.to(self.dtype),
            self.objective.timesteps(t),
            encoder_hidden_states=conditioning["context"].to(self.dtype),
            added_cond_kwargs=self._added(conditioning),
        ).sample.float()

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        pipeline_class = getattr(diffusers, self.pipelines[task])
        extra = {"requires_safety_checker": False} if "safety_checker" in self._pipe.components else {}
        pipe = pipeline_class(**self._pipe.components, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": conditioning["context"], "negative_prompt_embeds": negative["context"]}

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        kohya.save(path, tensors, manifest, len(self.towers) == 2, self.objective.scheduler.config.prediction_type)

    @classmethod
    def _tokens_for(cls, manifest: Manifest, place: Place) -> list[str]:
        if not manifest.tokens:
            return []
        code = [f"rows = load_file({place.path(EMBEDDINGS)})", f"tokens = {list(manifest.tokens)}".replace("'", '"')]
        for tokenizer, encoder, key in cls.towers:
            code.append(
                f'pipe.load_textual_inversion(list(rows["{key}"]), token=tokens, '
                f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer})"
            )
        if len(cls.towers) == 2:  # its configuration says 2, which makes transformers pool at the largest id
            tokenizer, encoder, _ = cls.towers[1]
            code.append(f"pipe.{encoder}.text_model.eos_token_id = pipe.{tokenizer}.eos_token_id")
        return code

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
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("tokenizer", "text_encoder", "clip_l"),
        ("tokenizer_2", "text_encoder_2", "clip_g"),
    )
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {
        "clip_l": ("clip_l", "clip_l"),
        "clip_g": ("clip_g", "clip_g"),
    }
    card_tags: ClassVar[tuple[str, ...]] = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": StableDiffusion.recommended["any"] | {"train_batch_size": 2},
        "full": {"learning_rate": 4e-6},
        "prefix": {"learning_rate": 1e-4},
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


def find_end_by_id(tower: TextTower) -> None:
    """Pool the text at its end token.

    CLIP configs of old say eos_token_id = 2 and pool at the largest id, which a new token would take from the end.
    """
    for module in tower.encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tower.tokenizer.eos_token_id
