"""Make a training archive from a drawing: `python -m toybox.concept --sprite X.png --count 12 --seed 0 --out X.zip`.

The sprite is pasted onto the world's backgrounds, at every position and size in turn, and captioned in varied wording.
Only the backgrounds that `toybox.sprite.for_training` allows are used: the others are kept for `toybox.score adapter`.
Of several sprites (`--sprite X.png Y.png --trigger ROB TEA`) each has a folder called as its trigger word, which the
setting `concepts` names; with `--together 12` a folder `together` shows both of two sprites in each picture.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from preprocessing.errors import UserError
from toybox.captions import compose
from toybox.sprite import Combination, combinations, load_sprite
from toybox.world import CENTRES, OFFSET, OVERSAMPLE, RADII, SIZE, Background, draw_background, paste_sprite, place
from trainer import commandline

TOGETHER = "together"  # the folder of pictures that show both
MAX_COUNT = 1000  # names have three digits
SIZE_SHARE = 0.4  # of the captions name the size


@dataclass(frozen=True)
class Pasted:
    """Where one picture shows the sprite; `jitter` in pixels."""

    background: Background
    position: str
    size: str
    jitter: tuple[float, float]


def plan(sprite: Image.Image, count: int, rng: random.Random, training: bool = True) -> list[Pasted]:
    """`count` pictures of the sprite: positions, sizes and backgrounds come in turn, so that each is as frequent."""
    return scatter(combinations(sprite, training, rng), count, rng)


def scatter(grounds: list[Combination], count: int, rng: random.Random) -> list[Pasted]:
    """As `plan`, on these backgrounds."""
    # Five positions and three sizes: turning together they go through all fifteen pairs.
    positions, sizes = rng.sample(list(CENTRES), len(CENTRES)), rng.sample(list(RADII), len(RADII))
    return [
        Pasted(
            background=Background(*grounds[i % len(grounds)], rng.random()),
            position=positions[i % len(positions)],
            size=sizes[i % len(sizes)],
            jitter=(rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
        )
        for i in range(count)
    ]


def _paste(canvas: Image.Image, sprites: Sequence[Image.Image], pasted: Pasted) -> None:
    """One sprite at its place, or two around it: side by side, at the left and right one above the other."""
    (x, y), radius = place(pasted.size, pasted.position, pasted.jitter)
    across, down = (0.0, OFFSET) if pasted.position in ("left", "right") else (OFFSET, 0.0)
    for sprite, side in zip(sprites, (-1, 1) if len(sprites) == 2 else (0,), strict=True):
        centre = ((x + side * across) * OVERSAMPLE, (y + side * down) * OVERSAMPLE)
        paste_sprite(canvas, sprite, centre, radius * OVERSAMPLE)


def picture_of(sprite: Image.Image, pasted: Pasted, beside: Image.Image | None = None) -> Image.Image:
    """The picture, with another sprite `beside` where one is given: RGB, 64x64."""
    canvas = draw_background(pasted.background)
    _paste(canvas, [sprite] if beside is None else [sprite, beside], pasted)
    return canvas.reduce(OVERSAMPLE)


def mask_of(sprite: Image.Image, pasted: Pasted, beside: Image.Image | None = None) -> Image.Image:
    """Where the sprites are in the picture: L, 64x64."""
    canvas = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2)
    outlines = [_white(each) for each in (sprite, beside) if each is not None]
    _paste(canvas, outlines, pasted)
    return canvas.reduce(OVERSAMPLE).convert("L")


def _white(sprite: Image.Image) -> Image.Image:
    outline = Image.new("RGBA", sprite.size, "white")
    outline.putalpha(sprite.getchannel("A"))
    return outline


def caption_of(pasted: Pasted, trigger: str, rng: random.Random) -> str:
    """A caption of varied wording with the trigger word for the sprite."""
    subject = f"a {pasted.size} {trigger}" if rng.random() < SIZE_SHARE else trigger
    return compose(subject, pasted.background, pasted.position, rng)


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A zip with the members in order, written whole; the same members give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    os.replace(temporary, path)


def make_archive(args: argparse.Namespace) -> None:
    """The archive that the command line asks for; UserError for sprites, a count or triggers that will not do."""
    for option, count, least in (("--count", args.count, 1), ("--together", args.together, 0)):
        if not least <= count <= MAX_COUNT:
            raise UserError(f"{option} {count} is out of range: ask for {least} to {MAX_COUNT} pictures")
    if len(args.trigger) != len(args.sprite) or len(set(args.trigger)) < len(args.trigger):
        raise UserError(f"--trigger: give {len(args.sprite)} different words, one for each sprite")
    for trigger in args.trigger:
        if not re.fullmatch(r"\S+", trigger):
            raise UserError(f"--trigger {trigger!r} is not one word: give a word without spaces")
    if args.together and (len(args.sprite) != 2 or TOGETHER in args.trigger):
        raise UserError(f"--together is for pictures of two sprites: give two, neither of them called {TOGETHER!r}")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: give the name of the zip to write")
    sprites = [load_sprite(path) for path in args.sprite]
    folders: dict[str, Iterator[tuple[str, bytes]]] = {}
    for number, (sprite, trigger) in enumerate(zip(sprites, args.trigger, strict=True)):
        seed = args.seed if number == 0 else f"{args.seed} {number}"
        folders[f"{trigger}/" if len(sprites) > 1 else ""] = members_of(sprite, trigger, args.count, seed)
    if args.together:
        folders[f"{TOGETHER}/"] = members_of_both(sprites, args.trigger, args.together, f"{args.seed} {TOGETHER}")
    unwanted = ((".txt",) if args.no_captions else ()) + (() if args.masks else (".mask.png",))
    members = {folder + name: data for folder, made in folders.items() for name, data in made}
    write_archive(args.out, {name: data for name, data in members.items() if not name.endswith(unwanted)})


def members_of(sprite: Image.Image, trigger: str, count: int, seed: int | str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` pictures of a sprite, each with its caption and its mask behind it."""
    # Two streams, so that pictures do not depend on whether captions are written.
    drawing, wording = random.Random(seed), random.Random(f"captions {seed}")
    for index, pasted in enumerate(plan(sprite, count, drawing)):
        yield from _files(index, [sprite], pasted, caption_of(pasted, trigger, wording))


def members_of_both(
    sprites: Sequence[Image.Image], triggers: Sequence[str], count: int, seed: str
) -> Iterator[tuple[str, bytes]]:
    """The same of two sprites in one picture, both small, on backgrounds that neither is lost on."""
    drawing, wording = random.Random(seed), random.Random(f"captions {seed}")
    first, second = (combinations(sprite, True, drawing) for sprite in sprites)
    shared = [ground for ground in first if ground in second]
    if not shared:
        raise UserError("--together: no background shows both drawings: give two that are not of so many colours")
    for index, pasted in enumerate(scatter(shared, count, drawing)):
        small = replace(pasted, size="small")
        text = compose(" beside ".join(triggers), small.background, small.position, wording)
        yield from _files(index, sprites, small, text)


def _files(index: int, sprites: Sequence[Image.Image], pasted: Pasted, text: str) -> Iterator[tuple[str, bytes]]:
    yield f"{index:03}.png", as_png(picture_of(sprites[0], pasted, *sprites[1:]))
    yield f"{index:03}.txt", (text + "\n").encode()
    yield f"{index:03}.mask.png", as_png(mask_of(sprites[0], pasted, *sprites[1:]))


def as_png(picture: Image.Image) -> bytes:
    """The picture's file."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m toybox.concept", description=__doc__.split("\n")[0])
    result.add_argument(
        "--sprite", type=Path, required=True, nargs="+", help="drawings on a transparent ground (RGBA), any size"
    )
    result.add_argument("--out", type=Path, required=True, help="the zip to write")
    result.add_argument("--count", type=int, default=12, help="how many pictures of each (default 12)")
    result.add_argument("--seed", type=int, default=0, help="the same seed makes the same archive (default 0)")
    result.add_argument(
        "--trigger", default=["TOK"], nargs="+", help="the word that stands for each sprite (default TOK)"
    )
    result.add_argument("--no_captions", action="store_true", help="pictures alone, without text beside them")
    result.add_argument(
        "--together", type=int, default=0, metavar="COUNT", help="how many pictures of both of two sprites (default 0)"
    )
    result.add_argument("--masks", action="store_true", help="also write where the sprite is, as x.mask.png")
    return result


def main(argv: list[str]) -> None:
    """The command line. Raises UserError for what the user can mend."""
    args = parser().parse_args(argv)
    make_archive(args)
    print(f"{args.out}: {args.count} pictures of {', '.join(map(str, args.sprite))}")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
