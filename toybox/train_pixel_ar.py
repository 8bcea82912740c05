"""Train the toybox's autoregressive model on the world at 32x32.

    python -m toybox.train_pixel_ar --out toybox/pixel_ar --work /tmp/pixel_ar

The model, its loss and its tokenizer are those of trainer.families.pixel_ar; the folder written is a base model that
train.py and predict.py take. Smaller pictures come first: the words tell as much of a picture of 8x8 pixels as of one
of 32x32, where sixteen times as many pixels, most of them like those beside them, drown it; a step takes as many pixels
of either. `--no_text` and `--no_prior` are for the ablation in its card.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from toybox import training
from toybox.captions import caption
from toybox.diffusion import PREVIEW_PROMPTS
from toybox.small import SIDE, scenes_of, small
from toybox.world import Scene
from trainer.families.pixel_ar.model import PixelAR, bits_per_dim
from trainer.families.pixel_ar.pipeline import PixelARPipeline
from trainer.families.pixel_ar.sampling import Sampling, draw
from trainer.families.pixel_ar.text import token_ids, vocabulary_tokenizer

CAPTION_DROPOUT = 0.1
MAX_TOKENS = 32
HELD_OUT, HELD_OUT_SEED = 256, 60_001
GUIDANCE = 2.0
PREVIEWED = [prompt for prompt in PREVIEW_PROMPTS if "sticker" not in prompt]


@dataclass(frozen=True)
class Stage:
    """A stretch of the training, in pictures of one size."""

    side: int  # pixels
    ends: float  # share of the steps that lie before its end

    def batch(self, largest: int) -> int:
        """Pictures a step: as many pixels as `largest` pictures of SIDE have."""
        return largest * (SIDE // self.side) ** 2


STAGES = (Stage(8, 0.2), Stage(16, 0.5), Stage(SIDE, 1.0))


def pictures_of(scenes: list[Scene], side: int, cache: Path) -> torch.Tensor:
    """uint8 [N, 3, side, side]; drawn once, then read from `cache`."""
    if not cache.exists():
        torch.save(training.to_tensor([small(scene, side) for scene in scenes]), cache)
    return torch.load(cache, weights_only=True)


def build(args: argparse.Namespace, vocabulary: int) -> PixelAR:
    """The model, untrained."""
    return PixelAR(
        image_size=SIDE,
        hidden_dim=args.hidden_dim,
        num_layers=args.num_layers,
        use_frequency_prior=not args.no_prior,
        vocab_size=0 if args.no_text else vocabulary,
        text_embed_dim=128,
        num_text_layers=2,
        text_nhead=4,
        max_text_length=MAX_TOKENS,
    )


@torch.no_grad()
def held_out_bits(model: PixelAR, tokenizer: Any, work: Path, blank: bool) -> float:
    """Bits a dimension of pictures that were never trained on, each with its plain caption, or all with none."""
    scenes = scenes_of(HELD_OUT_SEED, HELD_OUT)
    pictures = pictures_of(scenes, SIDE, work / "held_out.pt")
    ids = token_ids(tokenizer, ["" if blank else caption(scene) for scene in scenes], MAX_TOKENS)
    model.eval()
    batches = (slice(i, i + 16) for i in range(0, HELD_OUT, 16))
    found = [step_nats(model, pictures[part], ids[part], model.device).mean() for part in batches]
    model.train()
    return float(bits_per_dim(torch.stack(found).mean()))


def step_nats(model: PixelAR, pictures: torch.Tensor, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Nats of each value: [B, 3, side, side]."""
    # the plain attention: on a CPU the fused one's backward pass is twice as slow at this size
    with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return model.nats(pictures.to(device), ids.to(device))


def main() -> None:
    parser = training.arguments("Train the toybox's autoregressive model.", steps=6000, batch=8)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--hidden_dim", type=int, default=96)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--preview_every", type=int, default=1000)
    parser.add_argument("--no_prior", action="store_true", help="leave the frequency prior out")
    parser.add_argument("--no_text", action="store_true", help="leave the text out")
    args = parser.parse_args()
    device = training.start(args)
    scenes = scenes_of(args.seed, args.pictures)
    pictures = {
        stage: pictures_of(scenes, stage.side, args.work / f"pictures_{args.pictures}_{args.seed}_{stage.side}.pt")
        for stage in STAGES
    }
    wording = random.Random(args.seed + 1)
    tokenizer = vocabulary_tokenizer([caption(scene, wording) for scene in scenes], 1000)
    model = build(args, len(tokenizer)).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    run = training.Run(args.work / "pixel_ar.pt", {"model": model, "optimiser": optimiser, "average": average})
    run.resume()
    average.to(device)
    losses = []
    while run.step < args.steps:
        stage = next(stage for stage in STAGES if run.step < stage.ends * args.steps)
        index = torch.randint(len(scenes), (stage.batch(args.batch),))
        wording.seed(args.seed * 1_000_003 + run.step)
        captions = ["" if wording.random() < CAPTION_DROPOUT else caption(scenes[i], wording) for i in index]
        nats = step_nats(model, pictures[stage][index], token_ids(tokenizer, captions, MAX_TOKENS), device)
        loss = nats.mean()
        training.descend(optimiser, loss, args.learning_rate * training.cosine(run.step, args.steps, warmup=200))
        average.step(model.parameters())
        run.step += 1
        # of the first pixel only the words tell anything: there it shows whether they are read
        losses.append(bits_per_dim(torch.stack([loss.detach(), nats.detach()[:, :, 0, 0].sum(dim=1).mean()])))
        if run.step % 50 == 0:
            bits, first = torch.stack(losses[-50:]).mean(dim=0).tolist()
            run.report(args.steps, bits=bits, first_pixel=first)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
        if run.step % args.preview_every == 0:
            with training.averaged(average, list(model.parameters())):
                preview(model, tokenizer, args)
    average.store(model.parameters())
    last = held_out_bits(model, tokenizer, args.work, blank=False)
    average.copy_to(model.parameters())
    averaged = held_out_bits(model, tokenizer, args.work, blank=False)
    print(f"held-out pictures: {last:.4f} bits/dim by the last weights, {averaged:.4f} by their average", flush=True)
    if last < averaged:  # of a short run the average is too old
        average.restore(model.parameters())
    finish(model, tokenizer, args)


def preview(model: PixelAR, tokenizer: Any, args: argparse.Namespace) -> None:
    """A grid of the preview prompts, two pictures each."""
    if args.no_text:
        return
    model.eval()
    prompts = [prompt for prompt in PREVIEWED for _ in range(2)]
    ids = token_ids(tokenizer, prompts + [""] * len(prompts), MAX_TOKENS)
    uniform = torch.rand(len(prompts), SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = model.condition(ids, None)
    values = draw(model, condition, uniform, Sampling(guidance_scale=GUIDANCE))
    model.train()
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize((96, 96), 0) for one in values]
    make_image_grid(pictures, rows=2, cols=len(PREVIEWED)).save(args.work / "preview.png")


def finish(model: PixelAR, tokenizer: Any, args: argparse.Namespace) -> None:
    """Write the weights as a base model's folder in fp16, and say what they make of unseen pictures without words."""
    untold = held_out_bits(model, tokenizer, args.work, blank=True)
    print(f"held-out pictures: {untold:.4f} bits/dim without their captions", flush=True)
    pipe = PixelARPipeline(model, None if args.no_text else tokenizer)
    torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(args.out)


if __name__ == "__main__":
    main()
