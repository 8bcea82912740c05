"""Drawing with OmniGen2: Euler steps along the flow, led by the text and by the reference pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from trainer.samples import Conditioning

if TYPE_CHECKING:
    from trainer.families.omnigen2.family import OmniGen2

SIDE_WITHOUT_SHIFT = 40  # of latents whose times lie evenly; larger ones are drawn at more noise


def sampling_sigmas(steps: int, height: int, width: int) -> np.ndarray:
    """Noise levels of `steps` steps for latents of that size: 1 first, shifted towards noise by m = sqrt(h w) / 40.

    In the model's own time, t = 1 - sigma, this is t / (m - m t + t) of evenly spaced t.
    """
    shift = math.sqrt(height * width) / SIDE_WITHOUT_SHIFT
    even = np.linspace(1, 1 / steps, steps)
    return shift * even / (1 + (shift - 1) * even)


@dataclass(frozen=True)
class Guidance:
    """What the velocity is led by, and how strictly: away from `negative`, towards `text` and the references.

    u + s_i (r - u) + s_t (c - r), of the velocities c with text and references, r with the references alone and u with
    neither (after Brooks et al. 2023, arXiv:2211.09800, equation 3). An image scale of 1 or less leaves r out.
    """

    text: Conditioning
    negative: Conditioning
    references: Conditioning  # {} without any
    text_scale: float
    image_scale: float

    def velocity(self, family: OmniGen2, latents: Tensor, sigma: Tensor) -> Tensor:
        """Of latents [B, C, h, w] at one noise level."""
        t = sigma.expand(len(latents))
        towards = family.predict(latents, t, self.text | self.references)
        if self.text_scale <= 1:
            return towards
        away = family.predict(latents, t, self.negative)
        if not self.references or self.image_scale <= 1:
            return away + self.text_scale * (towards - away)
        shown = family.predict(latents, t, self.negative | self.references)
        return away + self.image_scale * (shown - away) + self.text_scale * (towards - shown)


@dataclass
class OmniGen2Pipeline:
    """Called as diffusers' pipelines are, with text that is encoded already; gives PIL pictures in `.images`."""

    family: OmniGen2
    scheduler: FlowMatchEulerDiscreteScheduler

    @torch.no_grad()
    def __call__(
        self,
        text: Conditioning,
        negative: Conditioning,
        generator: list[torch.Generator],
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        references: list[Image.Image] | None = None,
    ) -> SimpleNamespace:
        """One picture a generator, all with the same references (sides are multiples of a token's)."""
        family, vae = self.family, self.family.module("vae")
        shown = family.references_of(references or [])
        shown = {name: value.expand(len(generator), *value.shape[1:]) for name, value in shown.items()}
        led = Guidance(text, negative, shown if references else {}, guidance_scale, image_guidance_scale)
        shape = (family.channels, height // family.pixels_per_latent, width // family.pixels_per_latent)
        latents = torch.stack([torch.randn(shape, generator=one) for one in generator]).to(family.device)
        self.scheduler.set_timesteps(
            sigmas=sampling_sigmas(num_inference_steps, *shape[1:]).tolist(), device=family.device
        )
        for sigma, t in zip(self.scheduler.sigmas, self.scheduler.timesteps, strict=False):
            latents = self.scheduler.step(led.velocity(family, latents, sigma), t, latents).prev_sample
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = torch.cat([vae.decode(one[None].to(vae.dtype)).sample for one in unscaled])
        return SimpleNamespace(images=VaeImageProcessor().postprocess(pixels.float(), output_type="pil"))
