"""Train the toybox's text encoder and UNet.

    python -m toybox.train_sd --vae toybox/sd/vae --out toybox/sd --work /tmp/sd

The two are trained jointly from scratch with v-prediction on a zero-terminal-SNR schedule (Lin et al. 2023,
arXiv:2305.08891) and Min-SNR weights (Hang et al. 2023, arXiv:2303.09556). The folder written is a stock
StableDiffusionPipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from toybox import diffusion, training

SNR_GAMMA = 5.0
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def build_unet() -> UNet2DConditionModel:
    """The UNet, untrained: 4.8 M parameters, attention at 8x8 only, which halves the time of a step."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",  # one residual block: attention beside that of its neighbours costs a megabyte
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=192,
        norm_num_groups=16,
    )


class StableDiffusionLearner(diffusion.Learner):
    """The text encoder and the UNet."""

    name: ClassVar[str] = "sd"
    draw: ClassVar[dict[str, Any]] = {"guidance_scale": 4.0}

    def __init__(self, tokenizer: CLIPTokenizer, scaling_factor: float):
        super().__init__()
        self.latent_scale = scaling_factor
        self.tokenizer = tokenizer
        self.text_encoder = diffusion.build_clip(tokenizer, width=192)
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def forward(self, latents: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The Min-SNR weighted v errors of scaled latents: both [B, 4, 16, 16]."""
        device, latents = latents.device, latents.contiguous(memory_format=torch.channels_last)
        t = (diffusion.draw_times(len(latents)) * self.scheduler.config.num_train_timesteps).long().to(device)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, t)
        # the plain attention: on a CPU the fused one's backward pass is twice as slow at this size
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = self.text_encoder(diffusion.token_ids(self.tokenizer, captions, device)).last_hidden_state
            predicted = self.unet(noisy, t, states).sample.float()
        error = (predicted - self.scheduler.get_velocity(latents, noise, t)).square()
        snr = compute_snr(self.scheduler, t)
        # one more than Min-SNR's numerator, or the steps of pure noise, where drawing starts, would weigh nothing
        return error * ((snr.clamp(max=SNR_GAMMA) + 1) / (snr + 1)).view(-1, 1, 1, 1)

    def as_pipeline(self, vae: Path) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=True, steps_offset=0),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def main() -> None:
    args = diffusion.arguments("Train the toybox's text encoder and UNet.", steps=12000, batch=32).parse_args()
    device = training.start(args)
    world = diffusion.World.load(args, device)
    tokenizer = diffusion.build_clip_tokenizer(world.captions(args.seed + 1))
    scaling_factor = AutoencoderKL.load_config(args.vae)["scaling_factor"]
    diffusion.train(StableDiffusionLearner(tokenizer, scaling_factor).to(device), world, args)


if __name__ == "__main__":
    main()
