"""The decoder of Kandinsky 2.2: a UNet that denoises MoVQ latents, conditioned on a CLIP picture embedding alone.

It reads no text. While it is trained, each picture's own embedding is its condition, sometimes replaced by that of a
black picture, which classifier-free guidance leads away from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.artifact import ADAPTER, LORA_FILE, Manifest
from trainer.config import JobSettings
from trainer.families import model_config, resolve
from trainer.families.base import DENOISER, TEXT, VAE, Drawable, Geometry, Net, TextTower, quoted
from trainer.families.kandinsky22.half import (
    ATTENTION,
    HALF_PRECISION,
    IMAGE_ENCODER,
    Half,
    companion_for,
    drawing_code,
    load_companion,
    load_parts,
)
from trainer.model_card import Place
from trainer.samples import Conditioning, Picture, Sample

REPOSITORY = "kandinsky-community/kandinsky-2-2-prior"
CARD = "README.md"
CROSS_ATTENTION = (*ATTENTION, "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
UNET_TARGETS = {
    "attention": CROSS_ATTENTION,
    "attention_conv": CROSS_ATTENTION + CONVOLUTIONS,
    "all": (*CROSS_ATTENTION, *CONVOLUTIONS, "time_emb_proj"),
}


class Decoder(Half):
    """CLIP picture embedding -> picture. The encoder of the embeddings is the prior's."""

    name: ClassVar[str] = "kandinsky22_decoder"
    pipeline_class: ClassVar[str] = "KandinskyV22Pipeline"
    parts: ClassVar[dict[str, tuple[str, ...]]] = {DENOISER: ("unet",), TEXT: (), VAE: ("movq",)}
    recommended: ClassVar[dict[str, dict[str, Any]]] = Half.recommended | {
        "any": Half.recommended["any"] | {"captioner": "none"}
    }
    notes: ClassVar[tuple[str, ...]] = ("the decoder is trained on pictures alone: captions are not read",)

    def __init__(self, parts: dict[str, Any], dtype: torch.dtype):
        super().__init__(parts, dtype)
        self.nets = (Net("unet", DENOISER, UNET_TARGETS),)

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        unet, movq = (model_config(source, part) for part in ("unet", "movq"))
        per_latent = 2 ** (len(movq["block_out_channels"]) - 1)
        # the pipeline itself draws multiples of per_latent squared
        stride = per_latent * max(per_latent, 2 ** (len(unet["block_out_channels"]) - 1))
        return Geometry(stride, per_latent * unet["sample_size"])

    @classmethod
    def usual_companion(cls, source: str) -> str | None:
        """What the model's card names, if it lies here, else the published prior."""
        card = Path(resolve(source)) / CARD
        named = getattr(ModelCard.load(card).data, "prior", None) if card.is_file() else None
        return named[0] if named else REPOSITORY

    @classmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype, companion: str | None = None) -> Decoder:
        """As `Family.load`; of the companion the image encoder alone is loaded, with VAE."""
        loaded = load_parts(source, cls.wanted(parts), dtype)
        if VAE in parts:
            companion = companion or cls.usual_companion(source)
            loaded |= load_companion((companion, "kandinsky22_prior"), list(IMAGE_ENCODER), dtype)
        return cls(loaded, dtype)

    @classmethod
    def load_drawable(cls, source: str, companion: str | None, dtype: torch.dtype) -> Drawable:
        from trainer.families.kandinsky22.pair import Pair

        return Pair.of_decoder(source, companion, dtype)

    @classmethod
    def check(cls, settings: JobSettings) -> None:
        if settings.method not in ("lora", "full"):
            raise UserError(f"method {settings.method} teaches words, and the decoder reads none: use lora or full.")
        if settings.train_text_encoder or settings.preservation_weight:
            unused = "train_text_encoder" if settings.train_text_encoder else "preservation_weight"
            raise UserError(f"{unused} is about text, and the decoder reads none: leave it out.")

    @classmethod
    def card_header(cls, manifest: Manifest, place: Place) -> dict[str, Any]:
        """`prior` is where diffusers' combined pipelines look for the other half."""
        return {"prior": [companion_for(manifest, place, REPOSITORY)]}

    @classmethod
    def how_to(cls, manifest: Manifest, base_model: str, place: Place) -> str:
        prompt, pipe = f"a photo of {manifest.title}", "AutoPipelineForText2Image.from_pretrained"
        if manifest.method == "full":
            return drawing_code(prompt, f"{pipe}({quoted(place.name)}, {HALF_PRECISION})")
        file = place.first(LORA_FILE, ADAPTER)
        return drawing_code(
            prompt,
            f"{pipe}({quoted(base_model)}, {HALF_PRECISION})",
            f'pipe.unet.load_lora_adapter({quoted(place.name)}, weight_name="{file}", prefix="unet")',
        )

    @property
    def text(self) -> list[TextTower]:
        return []

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        raise ValueError("the decoder has no tokenizer")

    def free(self, part: str) -> None:
        super().free(part)
        if part == VAE:
            for name in IMAGE_ENCODER:
                self._parts.pop(name, None)

    @torch.no_grad()
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        movq = self._parts["movq"]
        pixels = torch.stack([picture.pixels for picture in pictures]).to(self.device, movq.dtype)
        latents, embeds = movq.encode(pixels).latents.float().cpu(), self.image_embeds(pictures).cpu()
        samples = []
        for picture, caption, mean, embed in zip(pictures, captions, latents, embeds, strict=True):
            mask = None if picture.mask is None else nn.functional.adaptive_avg_pool2d(picture.mask, mean.shape[-2:])
            samples.append(Sample(mean, torch.zeros_like(mean), caption, mask, {"image_embeds": embed}))
        return samples

    def null_picture(self) -> Conditioning:
        return {"image_embeds": self.black_embeds()[0].float()}

    def encode_text(self, captions: list[str]) -> Conditioning:
        return {}

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        predicted = self._parts["unet"](
            noisy.to(self.dtype),
            self.objective.timesteps(t),
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": conditioning["image_embeds"].to(self.dtype)},
        ).sample
        # the channels behind are the learned variance, which has no loss of its own
        return predicted[:, : noisy.shape[1]].float()
