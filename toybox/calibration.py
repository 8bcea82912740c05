"""How far the oracle and the finder can be trusted: both are tried on fresh renders whose truth is known.

Every attribute must be accepted in at least 99 % of true renders and at most 1 % of wrong ones, also after a mild
blur, noise and a round trip through the toybox's VAE.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from toybox.concept import picture_of, plan
from toybox.drawings import random_drawing
from toybox.finder import Finder
from toybox.oracle import agreement, look
from toybox.palette import COLOURS, Rgb
from toybox.shapes import SHAPES, shape_mask
from toybox.world import CENTRES, DRAWING, PATTERNS, Scene, random_scene, render

VAE_FOLDER = Path(__file__).parent / "sd" / "vae"
BLUR = 0.8  # pixels
NOISE = 8.0  # standard deviation, of 255
SPRITE_SIDE = 160
Pictures = list[Image.Image]
Damage = Callable[[Pictures], Pictures]


@dataclass(frozen=True)
class Rates:
    """Shares (0..1) of true and of wrong renders that were accepted, by what was asked."""

    accepted: dict[str, float]
    wrong: dict[str, float]


def blurred(pictures: Pictures) -> Pictures:
    """Pictures after a mild Gaussian blur."""
    return [picture.filter(ImageFilter.GaussianBlur(BLUR)) for picture in pictures]


def noisy(pictures: Pictures) -> Pictures:
    """Pictures with mild Gaussian noise, always the same."""
    rng = np.random.default_rng(0)
    stack = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    damaged = (stack + rng.normal(0, NOISE, stack.shape)).clip(0, 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in damaged]


def through_vae(pictures: Pictures) -> Pictures:
    """Pictures encoded (one sample of the posterior, always the same) and decoded by the toybox's VAE."""
    import torch
    from diffusers import AutoencoderKL

    from toybox.training import normalise, to_tensor

    vae = AutoencoderKL.from_pretrained(VAE_FOLDER, torch_dtype=torch.float32).eval()
    random_state = torch.Generator().manual_seed(0)
    damaged: Pictures = []
    with torch.no_grad():
        for start in range(0, len(pictures), 32):
            images = normalise(to_tensor(pictures[start : start + 32]))
            decoded = vae.decode(vae.encode(images).latent_dist.sample(random_state)).sample.clamp(-1, 1)
            pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
            damaged += [Image.fromarray(picture) for picture in pixels.numpy()]
    return damaged


def halved(pictures: Pictures) -> Pictures:
    """Pictures at half their size, as the autoregressive model draws them."""
    return [picture.reduce(2) for picture in pictures]


def damages() -> dict[str, Damage]:
    """What renders are put through before they are judged; the VAE only where it lies in the repository."""
    known: dict[str, Damage] = {
        "as drawn": lambda pictures: pictures,
        "blurred": blurred,
        "noisy": noisy,
        "halved": halved,
    }
    return known | ({"through the VAE": through_vae} if VAE_FOLDER.is_dir() else {})


def _wrong_scenes(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that differ from `scene` in one attribute; "object" has another object, "drawing" a sticker."""
    ground = scene.background
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    colour = rng.choice([c for c in COLOURS if c not in (scene.colour, ground.colour)])
    other_ground = rng.choice([c for c in COLOURS if c not in (scene.colour, ground.colour)])
    return {
        "shape": replace(scene, shape=shape),
        "colour": replace(scene, colour=colour),
        "pattern": replace(scene, background=replace(ground, pattern=rng.choice(_others(PATTERNS, ground.pattern)))),
        "background": replace(scene, background=replace(ground, colour=other_ground)),
        "position": replace(scene, position=rng.choice(_others(list(CENTRES), scene.position))),
        "object": replace(scene, shape=shape, colour=colour),
        "drawing": replace(scene, shape=DRAWING, drawing_seed=rng.randrange(2**31)),
    }


def _others(options: tuple[str, ...] | list[str], one: str) -> list[str]:
    return [option for option in options if option != one]


ASKED = {"pattern": ("background",), "object": ("shape", "colour"), "drawing": ("shape", "colour")}


def oracle_rates(count: int, seed: int, damage: Damage) -> Rates:
    """The oracle on `count` one-coloured scenes and, for every second of them, on each kind of wrong scene."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, drawings=0, accents=0) for _ in range(count)]
    seen = [agreement(look(picture), scene) for picture, scene in _shown(scenes, scenes, damage)]
    accepted = {name: float(np.mean([s[name] for s in seen])) for name in seen[0]}
    asked_for = scenes[::2]
    altered = [_wrong_scenes(scene, rng) for scene in asked_for]
    wrong = {}
    for kind in altered[0]:
        asked = ASKED.get(kind, (kind,))
        pairs = _shown([scene[kind] for scene in altered], asked_for, damage)
        wrong[kind] = float(np.mean([all(agreement(look(p), scene)[name] for name in asked) for p, scene in pairs]))
    return Rates(accepted, wrong)


def _shown(drawn: list[Scene], asked: list[Scene], damage: Damage) -> list[tuple[Image.Image, Scene]]:
    return list(zip(damage([render(scene) for scene in drawn]), asked, strict=True))


def main_colours(sprite: Image.Image, count: int = 4) -> list[Rgb]:
    """Up to `count` colours that the sprite is mostly made of, the most frequent first."""
    pixels = np.asarray(sprite)
    solid = pixels[pixels[..., 3] > 128][:, :3]
    if not len(solid):
        return [COLOURS["grey"]]
    reduced = Image.fromarray(solid[None]).quantize(count, Image.Quantize.MEDIANCUT)
    palette = reduced.getpalette()
    ranked = sorted(reduced.getcolors(), reverse=True)
    return [tuple(palette[3 * index : 3 * index + 3]) for _, index in ranked]


def plain_shape(shape: str, colours: list[Rgb]) -> Image.Image:
    """One of the world's shapes as a sprite: in one colour, or with a spot of a second one."""
    middle = SPRITE_SIDE / 2
    mask = shape_mask(shape, SPRITE_SIDE, (middle, middle), 0.47 * SPRITE_SIDE)
    sprite = Image.new("RGBA", mask.size, (*colours[0], 0))
    sprite.putalpha(mask)
    if len(colours) > 1:
        spot = Image.new("L", mask.size, 0)
        spot.paste(mask, mask=shape_mask("circle", SPRITE_SIDE, (middle, middle), 0.2 * SPRITE_SIDE))
        sprite.paste((*colours[1], 255), mask=spot)
    return sprite.crop(sprite.getchannel("A").getbbox())


def recoloured(drawing: Image.Image, colours: list[Rgb]) -> Image.Image:
    """The drawing in other colours: its most frequent colour becomes the first of them, and so on."""
    pixels = np.asarray(drawing).copy()
    flat = pixels[..., :3].reshape(-1, 3)
    solid = pixels[..., 3].reshape(-1) > 0
    kinds, index = np.unique(flat, axis=0, return_inverse=True)
    index = index.reshape(-1)
    order = np.argsort(-np.bincount(index[solid], minlength=len(kinds)), kind="stable")
    painted = np.empty_like(kinds)
    for rank, kind in enumerate(order):
        painted[kind] = colours[rank % len(colours)]
    pixels[..., :3] = painted[index].reshape((*pixels.shape[:2], 3))
    return Image.fromarray(pixels)


def wrong_sprites(sprite: Image.Image, count: int, rng: random.Random) -> list[Image.Image]:
    """Objects that are not the sprite: shapes and drawings, by turns in their own and in the sprite's colours."""
    own = main_colours(sprite)
    made: list[Callable[[], Image.Image]] = [
        lambda: plain_shape(rng.choice(list(SHAPES)), rng.sample(list(COLOURS.values()), 2)[: rng.randint(1, 2)]),
        lambda: random_drawing(rng),
        lambda: plain_shape(rng.choice(list(SHAPES)), own[: rng.randint(1, 2)]),
        lambda: recoloured(random_drawing(rng), own),
    ]
    return [made[i % len(made)]() for i in range(count)]


def finder_rates(sprite: Image.Image, count: int, seed: int, damage: Damage) -> Rates:
    """The finder on `count` pastes of the sprite and on as many of wrong objects, on the score's backgrounds."""
    rng = random.Random(seed)
    finder = Finder(sprite)
    scenes = plan(sprite, count, rng, training=False)
    true = damage([picture_of(sprite, pasted) for pasted in scenes])
    others = zip(wrong_sprites(sprite, count, rng), scenes, strict=True)
    wrong = damage([picture_of(other, pasted) for other, pasted in others])
    found_true, found_wrong = (float(np.mean([finder.find(p).found for p in pictures])) for pictures in (true, wrong))
    return Rates({"sprite": found_true}, {"sprite": found_wrong})
