"""What the scripts that train a text-to-image model of the world share: its latents, the loop, the previews."""

from __future__ import annotations

import argparse
import json
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toybox import training
from toybox.captions import caption
from toybox.world import DRAWING, SIZE, Scene, place, random_scene, render

CLIP_TOKENS = 48
NOISIEST = (0.0, 0.5, 0.75)  # where each turn of the times begins; 1 is noise alone
CAPTION_DROPOUT = 0.1
LATENTS = 16  # side of the latents of a picture
OBJECT = 4.0  # what a place of the object counts in the loss, beside one of the background
MUON_RATE = 1.4  # times the rate of AdamW
START, END = "<|startoftext|>", "<|endoftext|>"
PREVIEW_PROMPTS = (
    "a big red star on a striped blue background on the left",
    "a photo of a small yellow moon on a plain purple background at the top",
    "a medium green house on a dotted orange background on the right",
    "a cyan heart on a gradient brown background at the bottom",
    "a black fish on a plain white background in the middle",
    "a sticker on a striped green background on the left",
    "a big pink circle with a black rim on a grey background on the right",
    "a white flower on a dotted red background at the bottom",
)


def build_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose words are learned from the captions; every byte is in it, so any prompt tokenises."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = letters + [letter + "</w>" for letter in letters]
    words += [word for word in (first + second for first, second in merges) if word not in set(words)]
    vocabulary = {word: index for index, word in enumerate([*words, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def build_clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A CLIP text encoder, untrained: two layers, heads of 32."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: Any, captions: list[str], device: torch.device) -> Tensor:
    """The captions' token ids, padded to the tokenizer's full length: [B, L]."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids.to(device)


def draw_times(count: int) -> Tensor:
    """`count` times in [0, 1), in turns from all of them and from the noisiest half and quarter.

    Only there does the text alone decide what is drawn, and where; drawn evenly, the net learns those times last.
    """
    lowest = torch.tensor(NOISIEST).repeat(count)[:count]
    return lowest + torch.rand(count) * (1 - lowest)


@dataclass(frozen=True)
class World:
    """The scenes trained on, the posteriors of their pictures (mean and std side by side) and the VAE's folder."""

    scenes: list[Scene]
    posteriors: Tensor  # fp16 [N, 8, 16, 16]
    vae: Path

    @classmethod
    def load(cls, args: argparse.Namespace, device: torch.device) -> World:
        """The posteriors are made once, then read from the work folder."""
        rng = random.Random(args.seed)
        scenes = [random_scene(rng) for _ in range(args.pictures)]
        cache = args.work / f"posteriors_{args.pictures}_{args.seed}.pt"
        if not cache.exists():
            vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(device).eval()
            torch.save(_encode(vae, scenes, device), cache)
        return cls(scenes, torch.load(cache, weights_only=True), args.vae)

    @cached_property
    def told(self) -> list[int]:
        """The scenes whose object the caption tells: those without a random drawing."""
        return [index for index, scene in enumerate(self.scenes) if scene.shape != DRAWING]

    def weights(self, index: Tensor) -> Tensor:
        """How much each place of the latents counts: OBJECT inside the square around the object. [B, 1, 16, 16].

        What is decided last, and by the fewest pixels, is the object's shape.
        """
        grid = torch.arange(LATENTS) + 0.5
        placed = [place(scene.size, scene.position, scene.jitter) for scene in (self.scenes[i] for i in index)]
        (x, y), radius = zip(*(centre for centre, _ in placed), strict=True), [radius for _, radius in placed]
        scale, reach = LATENTS / SIZE, torch.tensor(radius) * LATENTS / SIZE
        inside = [(grid - torch.tensor(middle)[:, None] * scale).abs() <= reach[:, None] for middle in (y, x)]
        return 1 + (OBJECT - 1) * (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None]

    def captions(self, seed: int) -> list[str]:
        """A caption of each scene in varied wording."""
        wording = random.Random(seed)
        return [caption(scene, wording) for scene in self.scenes]


@torch.no_grad()
def _encode(vae: AutoencoderKL, scenes: list[Scene], device: torch.device) -> Tensor:
    parts = []
    for start in range(0, len(scenes), 256):
        pictures = training.to_tensor([render(scene) for scene in scenes[start : start + 256]])
        posterior = vae.encode(training.normalise(pictures).to(device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], dim=1).half().cpu())
        print(f"encoded {start + len(pictures)} of {len(scenes)} pictures", flush=True)
    return torch.cat(parts)


class Learner(nn.Module, ABC):
    """The nets that are trained, as one module, with their loss."""

    name: ClassVar[str]
    draw: ClassVar[dict[str, Any]]  # arguments of the pipeline for the previews
    latent_shift: float = 0.0
    latent_scale: float

    @abstractmethod
    def forward(self, latents: Tensor, captions: list[str]) -> Tensor:
        """The weighted squared errors of latents that are shifted and scaled: both [B, 4, 16, 16]."""

    def matrices(self) -> list[nn.Parameter]:
        """Weights that Muon (Jordan 2024; its rate as of Liu et al. 2025, arXiv:2502.16982) trains and not AdamW."""
        return []

    @abstractmethod
    def as_pipeline(self, vae: Path) -> DiffusionPipeline:
        """The stock pipeline around the nets."""


def arguments(description: str, steps: int, batch: int) -> argparse.ArgumentParser:
    """The options that these scripts have beside those of all."""
    parser = training.arguments(description, steps, batch)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--preview_every", type=int, default=1000)
    parser.add_argument(
        "--told", type=float, default=0.0, help="share of the run, its first, without drawings, which no caption tells"
    )
    return parser


def train(learner: Learner, world: World, args: argparse.Namespace) -> None:
    """Train from scratch, or from the last saved state, to the last step; write the pipeline's folder."""
    device = next(learner.parameters()).device
    optimiser = _optimiser(learner)
    average = EMAModel(learner.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    parts = {"learner": learner, "optimiser": optimiser, "average": average}
    run = training.Run(args.work / f"{learner.name}.pt", parts)
    run.resume()
    average.to(device)
    wording, losses = random.Random(), []
    while run.step < args.steps:
        chosen = world.told if run.step < args.told * args.steps else range(len(world.scenes))
        index = torch.tensor([chosen[i] for i in torch.randint(len(chosen), (args.batch,))])
        wording.seed(args.seed * 1_000_003 + run.step)
        captions = ["" if wording.random() < CAPTION_DROPOUT else caption(world.scenes[i], wording) for i in index]
        mean, std = world.posteriors[index].float().to(device).chunk(2, dim=1)
        latents = (mean + std * torch.randn_like(mean) - learner.latent_shift) * learner.latent_scale
        weights = world.weights(index).to(device)
        loss = (learner(latents, captions) * weights).sum() / (weights.sum() * latents.shape[1])
        training.descend(optimiser, loss, args.learning_rate * training.cosine(run.step, args.steps, warmup=300))
        average.step(learner.parameters())
        run.step += 1
        losses.append(loss.item())
        if run.step % 50 == 0:
            run.report(args.steps, loss=sum(losses[-50:]) / len(losses[-50:]))
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
        if run.step % args.preview_every == 0 or run.step == args.steps:
            _finish(learner, average, world.vae, args)


def _optimiser(learner: Learner) -> training.Together:
    """AdamW, and Muon for the learner's matrices."""
    matrices = learner.matrices()
    apart = {id(matrix) for matrix in matrices}
    others = [value for value in learner.parameters() if value.requires_grad and id(value) not in apart]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)]
    if matrices:
        group = {"params": matrices, "rate": MUON_RATE}
        parts.append(torch.optim.Muon([group], weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"))
    return training.Together(*parts)


def _finish(learner: Learner, average: EMAModel, vae: Path, args: argparse.Namespace) -> None:
    """Write the averaged weights as a pipeline folder in fp16, and a grid of what it draws."""
    with training.averaged(average, list(learner.parameters())):
        pipeline = learner.as_pipeline(vae)
        _preview(pipeline.to(args.device), learner.draw, args.work / "preview.png")
        pipeline.to("cpu", torch.float16).save_pretrained(args.out)
        learner.to(args.device, torch.float32)


def _preview(pipeline: DiffusionPipeline, draw: dict[str, Any], path: Path) -> None:
    """A grid of the preview prompts, four pictures each."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(4)]
    with torch.autocast(pipeline.device.type, dtype=torch.bfloat16):
        negative = [""] * len(prompts)
        pictures = pipeline(
            prompts, negative_prompt=negative, num_inference_steps=20, generator=generator, **draw
        ).images
    make_image_grid(pictures, rows=len(PREVIEW_PROMPTS) // 2, cols=8).save(path)
