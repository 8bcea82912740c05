"""Make a training archive from a drawing: `python -m toybox.concept --sprite X.png --count 12 --seed 0 --out X.zip`.

The sprite is pasted onto the world's backgrounds, at every position and size in turn, and captioned in varied wording.
Only the backgrounds that `toybox.sprite.for_training` allows are used: the others are kept for `toybox.score adapter`.
Of several sprites (`--sprite X.png Y.png --trigger ROB TEA`) each has a folder called as its trigger word, which the
setting `concepts` names.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from preprocessing.errors import UserError
from toybox.captions import compose
from toybox.sprite import combinations, load_sprite
from toybox.world import CENTRES, OVERSAMPLE, RADII, SIZE, Background, draw_background, paste_sprite, place
from trainer import commandline

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
    grounds = combinations(sprite, training, rng)
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


def picture_of(sprite: Image.Image, pasted: Pasted) -> Image.Image:
    """The picture: RGB, 64x64."""
    canvas = draw_background(pasted.background)
    (x, y), radius = place(pasted.size, pasted.position, pasted.jitter)
    paste_sprite(canvas, sprite, (x * OVERSAMPLE, y * OVERSAMPLE), radius * OVERSAMPLE)
    return canvas.reduce(OVERSAMPLE)


def mask_of(sprite: Image.Image, pasted: Pasted) -> Image.Image:
    """Where the sprite is in the picture: L, 64x64."""
    outline = Image.new("RGBA", sprite.size, "white")
    outline.putalpha(sprite.getchannel("A"))
    canvas = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2)
    (x, y), radius = place(pasted.size, pasted.position, pasted.jitter)
    paste_sprite(canvas, outline, (x * OVERSAMPLE, y * OVERSAMPLE), radius * OVERSAMPLE)
    return canvas.reduce(OVERSAMPLE).convert("L")


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
    if not 1 <= args.count <= MAX_COUNT:
        raise UserError(f"--count {args.count} is out of range: ask for 1 to {MAX_COUNT} pictures")
    if len(args.trigger) != len(args.sprite) or len(set(args.trigger)) < len(args.trigger):
        raise UserError(f"--trigger: give {len(args.sprite)} different words, one for each sprite")
    for trigger in args.trigger:
        if not re.fullmatch(r"\S+", trigger):
            raise UserError(f"--trigger {trigger!r} is not one word: give a word without spaces")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: give the name of the zip to write")
    members: dict[str, bytes] = {}
    for number, (path, trigger) in enumerate(zip(args.sprite, args.trigger, strict=True)):
        seed = args.seed if number == 0 else f"{args.seed} {number}"
        folder = f"{trigger}/" if len(args.sprite) > 1 else ""
        made = members_of(load_sprite(path), trigger, args.count, seed)
        unwanted = ((".txt",) if args.no_captions else ()) + (() if args.masks else (".mask.png",))
        members |= {f"{folder}{name}": data for name, data in made if not (unwanted and name.endswith(unwanted))}
    write_archive(args.out, members)


def members_of(sprite: Image.Image, trigger: str, count: int, seed: int | str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` pictures of a sprite, each with its caption and its mask behind it."""
    # Two streams, so that pictures do not depend on whether captions are written.
    drawing, wording = random.Random(seed), random.Random(f"captions {seed}")
    for index, pasted in enumerate(plan(sprite, count, drawing)):
        yield f"{index:03}.png", as_png(picture_of(sprite, pasted))
        yield f"{index:03}.txt", (caption_of(pasted, trigger, wording) + "\n").encode()
        yield f"{index:03}.mask.png", as_png(mask_of(sprite, pasted))


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
    result.add_argument("--masks", action="store_true", help="also write where the sprite is, as x.mask.png")
    return result


def main(argv: list[str]) -> None:
    """The command line. Raises UserError for what the user can mend."""
    args = parser().parse_args(argv)
    make_archive(args)
    print(f"{args.out}: {args.count} pictures of {', '.join(map(str, args.sprite))}")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
