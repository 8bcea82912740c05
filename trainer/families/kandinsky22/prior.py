"""The prior of Kandinsky 2.2: a transformer that denoises the CLIP embedding of the picture that a text describes.

x0 = (CLIP(picture) - clip_mean) / clip_std, [D], is what is noised and what is predicted (unCLIP: Ramesh et al. 2022,
arXiv:2204.06125, section 2.2), conditioned on the text's pooled embedding and its tokens.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from preprocessing.errors import UserError
from trainer.artifact import ADAPTER, EMBEDDINGS, LORA_FILE, Manifest
from trainer.config import JobSettings
from trainer.families.base import (
    DENOISER,
    TEXT,
    VAE,
    Drawable,
    Geometry,
    Net,
    TextTower,
    quoted,
)
from trainer.families.kandinsky22.half import (
    ATTENTION,
    HALF_PRECISION,
    IMAGE_ENCODER,
    Half,
    companion_class,
    companion_for,
    drawing_code,
    load_parts,
)
from trainer.families.pipeline_family import find_end_by_id
from trainer.families.stable_diffusion import TEXT_TARGETS
from trainer.model_card import Place
from trainer.samples import Conditioning, Picture, Sample

REPOSITORY = "kandinsky-community/kandinsky-2-2-decoder"
PRIOR_TARGETS = {
    "attention": ATTENTION,
    "attention_conv": ATTENTION,  # it has no convolutions
    "all": (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_to_clip_embeddings"),
}


class Prior(Half):
    """Text -> CLIP picture embedding. Its samples are vectors; the pictures' sizes do not matter to it."""

    name: ClassVar[str] = "kandinsky22_prior"
    pipeline_class: ClassVar[str] = "KandinskyV22PriorPipeline"
    card_tags: ClassVar[tuple[str, ...]] = (*Half.card_tags, "prior")
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        DENOISER: ("prior",),
        TEXT: ("text_encoder", "tokenizer"),
        VAE: IMAGE_ENCODER,
    }
    notes: ClassVar[tuple[str, ...]] = ("the prior learns CLIP's embedding of each whole picture: masks are not used",)

    def __init__(self, parts: dict[str, Any], dtype: torch.dtype):
        super().__init__(parts, dtype)
        self.nets = (
            Net("prior", DENOISER, PRIOR_TARGETS, frozenset({"clip_mean", "clip_std"})),
            Net("text_encoder", TEXT, TEXT_TARGETS),
        )
        for tower in self.text:
            find_end_by_id(tower)

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        return Geometry(stride=8, resolution=512)  # CLIP makes its own size of any; this is what the decoder draws

    @classmethod
    def usual_companion(cls, source: str) -> str | None:
        return REPOSITORY

    @classmethod
    def drawn_geometry(cls, source: str, companion: str | None) -> Geometry:
        return companion_class(companion, "kandinsky22_decoder").geometry(companion)

    @classmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype, companion: str | None = None) -> Prior:
        """As `Family.load`; the companion is for drawing alone and is not touched."""
        return cls(load_parts(source, cls.wanted(parts), dtype), dtype)

    @classmethod
    def load_drawable(cls, source: str, companion: str | None, dtype: torch.dtype) -> Drawable:
        from trainer.families.kandinsky22.pair import Pair

        return Pair.of_prior(source, companion, dtype)

    @classmethod
    def check(cls, settings: JobSettings) -> None:
        if settings.noise_offset:
            raise UserError("noise_offset is for latents with colours, the prior's are vectors: leave it at 0.")
        if settings.enable_xformers:
            raise UserError("enable_xformers does not train the prior, whose attention is masked: leave it off.")

    @classmethod
    def how_to(cls, manifest: Manifest, base_model: str, place: Place) -> str:
        decoder = quoted(companion_for(manifest, place, REPOSITORY))
        prompt = f"a photo of {manifest.called}"
        if manifest.method == "full":
            return drawing_code(
                prompt,
                f"DiffusionPipeline.from_pretrained({quoted(place.name)}, {HALF_PRECISION})",
                'prior = {f"prior_{name}": part for name, part in pipe.components.items()}',
                f"pipe = AutoPipelineForText2Image.from_pretrained({decoder}, **prior, {HALF_PRECISION})",
            )
        lines = []
        if file := place.first(LORA_FILE, ADAPTER):
            lines.append(
                f'pipe.prior_prior.load_lora_adapter({quoted(place.name)}, weight_name="{file}", prefix="prior")'
            )
        pipe = f"AutoPipelineForText2Image.from_pretrained({decoder}, {HALF_PRECISION})"
        code = drawing_code(prompt, pipe, *lines, *cls._tokens_for(manifest, place))
        return "\n".join([*cls._imports_for(manifest, place), code])

    @classmethod
    def _tokens_for(cls, manifest: Manifest, place: Place) -> list[str]:
        if not manifest.tokens:
            return []
        return [
            f'rows = load_file({place.path(EMBEDDINGS)})["clip_g"]',
            f"pipe.prior_tokenizer.add_tokens({json.dumps(manifest.tokens)})",
            "pipe.prior_text_encoder.resize_token_embeddings(len(pipe.prior_tokenizer))",
            "pipe.prior_text_encoder.get_input_embeddings().weight.data[-len(rows) :] = rows",
            # its configuration says 2, which makes transformers pool at the largest id
            "pipe.prior_text_encoder.text_model.eos_token_id = pipe.prior_tokenizer.eos_token_id",
        ]

    @property
    def text(self) -> list[TextTower]:
        if "text_encoder" not in self._parts:
            return []
        return [TextTower(self._parts["tokenizer"], self._parts["text_encoder"], "text_encoder", "clip_g")]

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        self._parts["tokenizer"] = tokenizer

    @torch.no_grad()
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        prior = self._parts["prior"]
        rows = (self.image_embeds(pictures) - prior.clip_mean.float()) / prior.clip_std.float()
        return [
            Sample(row.cpu(), torch.zeros_like(row, device="cpu"), caption)
            for row, caption in zip(rows, captions, strict=True)
        ]

    def encode_text(self, captions: list[str]) -> Conditioning:
        """pooled [B, D], context [B, L, D], and mask [B, L], 1 where there is text."""
        tokenizer, encoder = self._parts["tokenizer"], self._parts["text_encoder"]
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        encoded = encoder(tokens.input_ids)
        return {
            "pooled": encoded.text_embeds,
            "context": encoded.last_hidden_state,
            "mask": tokens.attention_mask.to(encoded.text_embeds.dtype),
        }

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._parts["prior"](
            noisy.to(self.dtype),
            self.objective.timesteps(t),
            proj_embedding=conditioning["pooled"].to(self.dtype),
            encoder_hidden_states=conditioning["context"].to(self.dtype),
            attention_mask=conditioning["mask"] > 0,
        ).predicted_image_embedding.float()

    def enable_gradient_checkpointing(self) -> None:
        """diffusers has none for PriorTransformer: each block's forward pass is wrapped."""
        for block in self._parts["prior"].transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if "text_encoder" in self._parts:
            self._parts["text_encoder"].activation_checkpointing_enable()
