"""Train the toybox's text encoder and UNet.

    python -m toybox.train_sd --vae toybox/sd/vae --out toybox/sd --work /tmp/sd

The two are trained jointly from scratch with v-prediction on a zero-terminal-SNR schedule (Lin et al. 2023,
arXiv:2305.08891) and Min-SNR weights (Hang et al. 2023, arXiv:2303.09556). The folder written is a stock
StableDiffusionPipeline.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toybox import training
from toybox.captions import caption
from toybox.world import Scene, random_scene, render

MAX_TOKENS = 48
SNR_GAMMA = 5.0
NOISIEST = (0.0, 0.5, 0.75)  # where each turn of the timesteps begins, as a share of them
CAPTION_DROPOUT = 0.1
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


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
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
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder, untrained: two layers, 192 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=192,
    )
    return CLIPTextModel(config)


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


@torch.no_grad()
def encode_world(vae: AutoencoderKL, scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """Posteriors of the scenes' pictures, mean and standard deviation side by side: fp16 [N, 8, 16, 16]."""
    parts = []
    for start in range(0, len(scenes), 256):
        pictures = training.to_tensor([render(scene) for scene in scenes[start : start + 256]])
        posterior = vae.encode(training.normalise(pictures).to(device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], dim=1).half().cpu())
        print(f"encoded {start + len(pictures)} of {len(scenes)} pictures", flush=True)
    return torch.cat(parts)


def load_world(args: argparse.Namespace, device: torch.device) -> tuple[list[Scene], torch.Tensor, float]:
    """The training scenes, their posteriors (made once, then read from the work folder) and the scaling factor."""
    rng = random.Random(args.seed)
    scenes = [random_scene(rng) for _ in range(args.pictures)]
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(device).eval()
    cache = args.work / f"posteriors_{args.pictures}_{args.seed}.pt"
    if not cache.exists():
        torch.save(encode_world(vae, scenes, device), cache)
    return scenes, torch.load(cache, weights_only=True), vae.config.scaling_factor


class Learner(torch.nn.Module):
    """The text encoder and the UNet as one module, with the loss."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def draw_timesteps(self, count: int) -> torch.Tensor:
        """`count` timesteps, in turns from all of them and from the noisiest half and quarter.

        Only there does the text alone decide what is drawn, and where; drawn evenly, the net learns those steps last.
        """
        steps = self.scheduler.config.num_train_timesteps
        lowest = torch.tensor(NOISIEST).repeat(count)[:count] * steps
        return (lowest + torch.rand(count) * (steps - lowest)).long().clamp(max=steps - 1)

    def forward(self, latents: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The Min-SNR weighted v loss of scaled latents [B, 4, 16, 16]."""
        device = latents.device
        t = self.draw_timesteps(len(latents)).to(device)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, t)
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        # the plain attention: on a CPU the fused one's backward pass is twice as slow at this size
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = self.text_encoder(tokens).last_hidden_state
            predicted = self.unet(noisy, t, states).sample.float()
        error = (predicted - self.scheduler.get_velocity(latents, noise, t)).square().mean(dim=(1, 2, 3))
        snr = compute_snr(self.scheduler, t)
        # one more than Min-SNR's numerator, or the steps of pure noise, where drawing starts, would weigh nothing
        return (error * (snr.clamp(max=SNR_GAMMA) + 1) / (snr + 1)).mean()


def as_pipeline(learner: Learner, vae_folder: Path) -> StableDiffusionPipeline:
    """The stock pipeline around the learner's nets."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32),
        text_encoder=learner.text_encoder,
        tokenizer=learner.tokenizer,
        unet=learner.unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=True, steps_offset=0),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def preview(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """A grid of the preview prompts, four pictures each."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(4)]
    with torch.autocast(pipeline.device.type, dtype=torch.bfloat16):
        pictures = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator).images
    make_image_grid(pictures, rows=len(PREVIEW_PROMPTS) // 2, cols=8).save(path)


def main() -> None:
    parser = training.arguments("Train the toybox's text encoder and UNet.", steps=12000, batch=32)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--preview_every", type=int, default=1000)
    args = parser.parse_args()
    device = training.start(args)
    scenes, posteriors, scale = load_world(args, device)
    wording = random.Random(args.seed + 1)
    learner = Learner(build_tokenizer([caption(scene, wording) for scene in scenes])).to(device)
    learner.unet.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(learner.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    run = training.Run(args.work / "sd.pt", {"learner": learner, "optimiser": optimiser, "average": average})
    run.resume()
    average.to(device)
    losses = []
    while run.step < args.steps:
        for group in optimiser.param_groups:
            group["lr"] = args.learning_rate * training.cosine(run.step, args.steps, warmup=300)
        index = torch.randint(len(scenes), (args.batch,))
        wording.seed(args.seed * 1_000_003 + run.step)
        captions = ["" if wording.random() < CAPTION_DROPOUT else caption(scenes[i], wording) for i in index]
        mean, std = posteriors[index].float().to(device).chunk(2, dim=1)
        latents = (mean + std * torch.randn_like(mean)) * scale
        loss = learner(latents.contiguous(memory_format=torch.channels_last), captions)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        average.step(learner.parameters())
        run.step += 1
        losses.append(loss.item())
        if run.step % 50 == 0:
            run.report(args.steps, loss=sum(losses[-50:]) / len(losses[-50:]))
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
        if run.step % args.preview_every == 0 or run.step == args.steps:
            finish(learner, average, args)


def finish(learner: Learner, average: EMAModel, args: argparse.Namespace) -> None:
    """Write the averaged weights as a pipeline folder in fp16, and a grid of what it draws."""
    average.store(learner.parameters())
    average.copy_to(learner.parameters())
    pipeline = as_pipeline(learner, args.vae)
    preview(pipeline.to(args.device), args.work / "preview.png")
    pipeline.to("cpu", torch.float16).save_pretrained(args.out)
    learner.to(args.device, torch.float32)
    average.restore(learner.parameters())


if __name__ == "__main__":
    main()
