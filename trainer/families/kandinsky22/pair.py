"""Prior and decoder together: what draws. Text becomes a picture's embedding, and that a picture."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.families.base import DDPM_SCHEDULERS, IMAGE_TO_IMAGE, TEXT_TO_IMAGE, Drawable, TextTower
from trainer.families.kandinsky22.decoder import Decoder
from trainer.families.kandinsky22.half import ALL_PARTS, load_companion, load_parts
from trainer.families.kandinsky22.prior import Prior
from trainer.samples import Conditioning

DECODER_PIPELINES = {TEXT_TO_IMAGE: KandinskyV22Pipeline, IMAGE_TO_IMAGE: KandinskyV22Img2ImgPipeline}


class Pair(Drawable):
    """Both halves; weights find theirs by the names of the nets, so one archive may hold both."""

    name: ClassVar[str] = "kandinsky22"
    # diffusers' Kandinsky pipelines neither scale what the net sees nor do they call a step without generators
    schedulers: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        name: DDPM_SCHEDULERS[name] for name in ("ddim", "ddpm", "dpmsolver++")
    }
    draw_options: ClassVar[tuple[str, ...]] = ("prior_guidance_scale", "prior_num_inference_steps")

    def __init__(self, prior: Prior, decoder: Decoder):
        self.prior, self.decoder = prior, decoder
        self.nets = (*prior.nets, *decoder.nets)
        self.device = prior.device

    @classmethod
    def of_prior(cls, source: str, companion: str, dtype: torch.dtype) -> Pair:
        """A prior with a decoder as its companion, on the CPU; the image encoder is there once, the prior's."""
        decoder = load_companion((companion, Decoder.name), Decoder.wanted(ALL_PARTS), dtype)
        return cls(Prior(load_parts(source, Prior.wanted(ALL_PARTS), dtype), dtype), Decoder(decoder, dtype))

    @classmethod
    def of_decoder(cls, source: str, companion: str, dtype: torch.dtype) -> Pair:
        """A decoder with a prior as its companion."""
        prior = load_companion((companion, Prior.name), Prior.wanted(ALL_PARTS), dtype)
        return cls(Prior(prior, dtype), Decoder(load_parts(source, Decoder.wanted(ALL_PARTS), dtype), dtype))

    @property
    def serves(self) -> tuple[str, ...]:
        return (Prior.name, Decoder.name, self.name)

    def module(self, name: str) -> nn.Module | None:
        half = self.prior if any(net.name == name for net in self.prior.nets) else self.decoder
        return half.module(name)

    def to(self, device: torch.device) -> Pair:
        for half in (self.prior, self.decoder):
            half.to(device)
        self.device = device
        return self

    def encode_text(self, captions: list[str]) -> Conditioning:
        return self.prior.encode_text(captions)

    def negative_conditioning(self) -> Conditioning:
        """The embedding of a black picture, from which the decoder is led away, and the empty text, the prior."""
        return {"image_embeds": self.prior.black_embeds(), **self.prior.null_conditioning()}

    @property
    def text(self) -> list[TextTower]:
        return self.prior.text

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        self.prior.replace_tokenizer(encoder_name, tokenizer)

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        if task not in DECODER_PIPELINES:
            raise UserError("Kandinsky's decoder draws whole pictures, inpainting takes another one: leave mask out.")
        return CombinedPipeline(self.prior, DECODER_PIPELINES[task](**self.decoder.components()))

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"text": conditioning, "negative": negative}


class CombinedPipeline:
    """The stock pipelines of both halves, called in turn as diffusers' KandinskyV22CombinedPipeline calls them.

    That one takes prompts as words alone, and its prior gives a picture's numbers to its neighbours.
    """

    def __init__(self, prior: Prior, decoder_pipe: Any):
        self._prior, self._decoder_pipe = prior, decoder_pipe
        self._prior_pipe = EncodedPriorPipeline(**prior.components())
        for pipe in (self._prior_pipe, decoder_pipe):
            pipe.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> Any:
        """The decoder's."""
        return self._decoder_pipe.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if not isinstance(scheduler, DDPMScheduler):
            # the others know nothing of a learned variance, and the pipeline splits it off where none is named
            scheduler.register_to_config(variance_type=None)
        self._decoder_pipe.scheduler = scheduler

    @torch.no_grad()
    def __call__(
        self,
        text: Conditioning,
        negative: Conditioning,
        generator: list[torch.Generator],
        prior_guidance_scale: float,
        prior_num_inference_steps: int,
        width: int,
        height: int,
        **drawing: Any,
    ) -> Any:
        """`negative` is a text's encoding, or where there is no negative prompt `negative_conditioning`'s."""
        dtype, count = self._decoder_pipe.unet.dtype, len(generator)
        worded = "image_embeds" not in negative
        self._prior_pipe.give(text, negative, worded)
        embeds = self._prior_pipe(
            prompt=[""] * count,
            negative_prompt=[""] * count if worded else None,
            # with a negative prompt the prior also draws what the decoder is led away from
            generator=generator * 2 if worded else generator,
            guidance_scale=prior_guidance_scale,
            num_inference_steps=prior_num_inference_steps,
        )
        away = embeds.negative_image_embeds if worded else negative["image_embeds"]
        if start := drawing.get("image"):
            drawing |= {"image": [start] * count}
        return self._decoder_pipe(
            image_embeds=embeds.image_embeds.to(dtype),
            negative_image_embeds=away.to(dtype),
            generator=generator,
            width=width,
            height=height,
            **drawing,
        )


class EncodedPriorPipeline(KandinskyV22PriorPipeline):
    """The stock pipeline for text that is encoded already, with new tokens or between two meanings."""

    def give(self, text: Conditioning, negative: Conditioning, drawn: bool) -> None:
        """What the next call encodes its prompts to, and what it leads them away from, of as many rows.

        With `drawn` the call draws that too, behind the others.
        """
        away = {name: negative[name] for name in text}
        self._encoded = {name: torch.cat([text[name], away[name]]) for name in text} if drawn else text
        self._guided_from = {name: torch.cat([value, value]) for name, value in away.items()} if drawn else away

    def _encode_prompt(
        self,
        prompt: list[str],
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        encoded = self._encoded
        if do_classifier_free_guidance:
            encoded = {name: torch.cat([self._guided_from[name], value]) for name, value in encoded.items()}
        return encoded["pooled"], encoded["context"], encoded["mask"] > 0
