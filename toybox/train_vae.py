"""Train the toybox's VAE: `python -m toybox.train_vae --out toybox/sd/vae --work /tmp/vae`.

It sees more than the world: random drawings close up and at random scale, so that a sprite of any drawing survives it.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from toybox import training
from toybox.drawings import random_drawing
from toybox.palette import COLOURS
from toybox.world import OVERSAMPLE, PATTERNS, SIZE, Background, draw_background, paste_sprite, random_scene, render

CROP = 32
KL_WEIGHT = 1e-3  # per latent value; large enough that small errors of the diffusion model decode to small errors


def build_vae() -> AutoencoderKL:
    """The VAE, untrained: 64x64x3 -> 16x16x4, 1.5 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def crowded_picture(rng: random.Random) -> Image.Image:
    """A background with one to five random drawings of any size anywhere: 64x64."""
    canvas = draw_background(Background(rng.choice(PATTERNS), rng.choice(list(COLOURS)), rng.random()))
    for _ in range(rng.randint(1, 5)):
        centre = (rng.uniform(0, canvas.width), rng.uniform(0, canvas.width))
        paste_sprite(canvas, random_drawing(rng), centre, rng.uniform(8, 28) * OVERSAMPLE)
    return canvas.reduce(OVERSAMPLE)


def make_pictures(count: int, seed: int) -> torch.Tensor:
    """Half scenes of the world, half crowds of drawings: uint8 [count, 3, 64, 64]."""
    rng = random.Random(seed)
    pictures = [render(random_scene(rng, drawings=0.5)) if i % 2 else crowded_picture(rng) for i in range(count)]
    return training.to_tensor(pictures)


def random_crops(pictures: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, 3, CROP, CROP] in [-1, 1], flipped at random in both directions."""
    index = torch.randint(len(pictures), (batch,))
    corners = torch.randint(0, SIZE - CROP + 1, (batch, 2)).tolist()
    crops = torch.stack([pictures[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(index, corners, strict=True)])
    for axis in (-1, -2):
        crops = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, crops.flip(axis), crops)
    return training.normalise(crops)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device) -> float:
    """Mean PSNR in dB of whole pictures (uint8 [B, 3, 64, 64]) through the posterior's mean."""
    images = training.normalise(pictures).to(device)
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(errors)).mean())


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device) -> float:
    """1 / standard deviation of the latents, the field's `scaling_factor`."""
    latents = vae.encode(training.normalise(pictures).to(device)).latent_dist.sample()
    return float(1 / latents.std())


def main() -> None:
    parser = training.arguments("Train the toybox's VAE.", steps=3000, batch=32)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    device = training.start(args)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = training.Run(args.work / "vae.pt", {"vae": vae, "optimiser": optimiser})
    run.resume()
    pictures, unseen = make_pictures(args.pictures, args.seed), make_pictures(128, args.seed + 1_000_003)
    while run.step < args.steps:
        images = random_crops(pictures, args.batch).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - images
        kl = posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * kl
        training.descend(optimiser, loss, args.learning_rate * training.cosine(run.step, args.steps))
        run.step += 1
        if run.step % 50 == 0:
            run.report(args.steps, loss=loss.item(), mse=F.mse_loss(decoded, images).item(), kl=kl.item())
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
            print(f"step {run.step}  psnr {psnr(vae, unseen, device):.2f} dB", flush=True)
    vae.register_to_config(scaling_factor=latent_scale(vae, pictures[:512], device))
    vae.half().save_pretrained(args.out)
    print(f"psnr on unseen pictures {psnr(vae.float(), unseen, device):.2f} dB, scale {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    main()
