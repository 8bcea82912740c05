"""Train the toybox's captioner, a small BLIP.

    python -m toybox.train_captioner --out toybox/captioner --work /tmp/captioner

It learns the world's plain captions. Objects that are drawings are called "sticker": the user's trigger word takes
their place.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

from toybox import training
from toybox.captions import caption
from toybox.world import SIZE, Scene, random_scene, render

MAX_TOKENS = 32
SHIFT = 2  # pixels; without it a net of this size learns forty thousand pictures by heart
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def build_processor(captions: list[str], folder: Path) -> BlipProcessor:
    """Stock BLIP preprocessing for 64x64 pictures, with a vocabulary of the captions' words; written to `folder`."""
    words = sorted({word for text in captions for word in text.replace(",", " ,").split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=MAX_TOKENS, bos_token="[DEC]")
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer)
    processor.save_pretrained(folder)
    return processor


def build_model(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """The captioner, untrained."""
    shared = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    ids = tokenizer.convert_tokens_to_ids
    text = shared | {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 128,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 128,
        "bos_token_id": ids("[DEC]"),
        "eos_token_id": ids("[SEP]"),
        "sep_token_id": ids("[SEP]"),
        "pad_token_id": ids("[PAD]"),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    # BLIP's own initializer_range for vision, 1e-10, leaves a net that starts from scratch blind for thousands of steps
    vision = shared | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8, "initializer_range": 0.02}
    vision |= {"projection_dim": 128}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_batch(processor: BlipProcessor, scenes: list[Scene], pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Model inputs; [DEC] stands first, as in BLIP, and the padding is not learned."""
    texts = [caption(scene) for scene in scenes]
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    batch["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[DEC]")
    padding = batch["input_ids"] == processor.tokenizer.pad_token_id
    batch["labels"] = batch["input_ids"].masked_fill(padding, -100)
    return batch


def shifted(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W], each moved by up to SHIFT pixels; its border goes on outwards."""
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures.float(), (SHIFT,) * 4, mode="replicate").byte()
    corners = torch.randint(0, 2 * SHIFT + 1, (len(pictures), 2)).tolist()
    return torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)])


@torch.no_grad()
def exact_share(model: BlipForConditionalGeneration, processor: BlipProcessor, scenes: list[Scene]) -> float:
    """How often the greedy caption equals the scene's own, word for word."""
    model.eval()
    pixels = processor(images=[render(scene) for scene in scenes], return_tensors="pt").pixel_values
    tokens = model.generate(pixel_values=pixels.to(model.device), max_new_tokens=MAX_TOKENS - 2)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    model.train()
    return sum(text.strip() == caption(scene) for text, scene in zip(texts, scenes, strict=True)) / len(scenes)


def main() -> None:
    parser = training.arguments("Train the toybox's captioner.", steps=8000, batch=48)
    parser.add_argument("--pictures", type=int, default=40000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    device = training.start(args)
    rng = random.Random(args.seed + 17)
    scenes = [random_scene(rng) for _ in range(args.pictures)]
    pictures = training.to_tensor([render(scene) for scene in scenes])
    processor = build_processor([caption(scene) for scene in scenes], args.out)
    model = build_model(processor.tokenizer).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    run = training.Run(args.work / "captioner.pt", {"model": model, "optimiser": optimiser})
    run.resume()
    unseen = [random_scene(rng) for _ in range(200)]
    while run.step < args.steps:
        index = torch.randint(len(scenes), (args.batch,)).tolist()
        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in shifted(pictures[index])]
        batch = make_batch(processor, [scenes[i] for i in index], images).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        training.descend(optimiser, loss, args.learning_rate * training.cosine(run.step, args.steps, warmup=200))
        run.step += 1
        if run.step % 50 == 0:
            run.report(args.steps, loss=loss.item())
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()
        if run.step % 1000 == 0 or run.step == args.steps:
            print(f"step {run.step}  exact captions {exact_share(model, processor, unseen):.3f}", flush=True)
    model.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
