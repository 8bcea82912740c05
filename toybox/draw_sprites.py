"""Draw the demo sprites: `python -m toybox.draw_sprites --out toybox/sprites`.

`--shape moon --colour yellow` draws that alone, as the world draws it: a subject that the base models need not learn to
draw, for methods that can only ask for what a model can do.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from toybox.palette import COLOURS
from toybox.shapes import SHAPES, shape_mask

SIDE = 128
DETAIL = 4  # drawn this much larger, then reduced, so that edges are smooth

STEEL, STEEL_DARK, RUST, GLOW, COAL = "#9fb4c7", "#5d7388", "#d1495b", "#ffd166", "#22303c"
LEAF, LEAF_DARK, CREAM, PLUM = "#2a9d6f", "#1b6b50", "#fff3d6", "#7b2d63"
SAND, SAND_DARK, SKY, NIGHT = "#e9b872", "#b5793c", "#7cc6fe", "#30408d"


class Pencil:
    """Draws on a transparent square in units of the finished picture's pixels (0..128)."""

    def __init__(self) -> None:
        self.picture = Image.new("RGBA", (SIDE * DETAIL, SIDE * DETAIL), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.picture)

    def box(self, corners: tuple[float, ...], fill: str, radius: float = 0) -> None:
        self._draw.rounded_rectangle([DETAIL * c for c in corners], radius * DETAIL, fill=fill)

    def ellipse(self, corners: tuple[float, ...], fill: str) -> None:
        self._draw.ellipse([DETAIL * c for c in corners], fill=fill)

    def polygon(self, corners: tuple[float, ...], fill: str) -> None:
        self._draw.polygon([DETAIL * c for c in corners], fill=fill)

    def ring(self, corners: tuple[float, ...], colour: str, width: float) -> None:
        self._draw.ellipse([DETAIL * c for c in corners], outline=colour, width=round(width * DETAIL))

    def finished(self) -> Image.Image:
        return self.picture.reduce(DETAIL)


def robot() -> Image.Image:
    """A robot: square steel head with glowing eyes, red body with a dial, dark arms and feet."""
    pencil = Pencil()
    pencil.box((61, 4, 67, 20), COAL)
    pencil.ellipse((56, 0, 72, 14), GLOW)
    pencil.box((30, 16, 98, 62), STEEL, radius=8)
    pencil.box((38, 28, 90, 46), COAL, radius=8)
    pencil.ellipse((43, 29, 59, 45), GLOW)
    pencil.ellipse((69, 29, 85, 45), GLOW)
    pencil.box((50, 51, 78, 56), STEEL_DARK)
    pencil.box((54, 60, 74, 70), COAL)
    pencil.box((8, 70, 24, 106), STEEL_DARK, radius=6)
    pencil.box((104, 70, 120, 106), STEEL_DARK, radius=6)
    pencil.box((24, 66, 104, 112), RUST, radius=6)
    pencil.ellipse((50, 74, 78, 102), STEEL)
    pencil.polygon((64, 78, 70, 92, 58, 92), COAL)
    pencil.box((32, 112, 54, 127), COAL, radius=3)
    pencil.box((74, 112, 96, 127), COAL, radius=3)
    return pencil.finished()


def teapot() -> Image.Image:
    """A teapot: a green belly with a cream band, a spout to the left, a plum handle to the right and a lid."""
    pencil = Pencil()
    pencil.ring((84, 38, 126, 88), PLUM, 9)
    pencil.polygon((2, 34, 16, 34, 42, 72, 36, 96), LEAF_DARK)
    pencil.ellipse((24, 34, 106, 114), LEAF)
    pencil.box((25, 66, 105, 84), CREAM, radius=4)
    for x in (34, 53, 72, 91):
        pencil.ellipse((x, 70, x + 10, 80), PLUM)
    pencil.box((44, 108, 86, 118), LEAF_DARK, radius=3)
    pencil.ellipse((40, 24, 90, 48), LEAF_DARK)
    pencil.ellipse((56, 10, 74, 28), PLUM)
    return pencil.finished()


def rocket() -> Image.Image:
    """A rocket: a cream hull with a plum nose and a round window, blue fins, a two-coloured flame."""
    pencil = Pencil()
    pencil.polygon((48, 100, 80, 100, 64, 128), RUST)
    pencil.polygon((56, 100, 72, 100, 64, 116), GLOW)
    pencil.polygon((42, 64, 18, 104, 42, 98), NIGHT)
    pencil.polygon((86, 64, 110, 104, 86, 98), NIGHT)
    pencil.box((40, 38, 88, 102), CREAM, radius=8)
    pencil.polygon((40, 44, 88, 44, 64, 0), PLUM)
    pencil.box((40, 84, 88, 92), NIGHT)
    pencil.ellipse((50, 50, 78, 78), STEEL_DARK)
    pencil.ellipse((55, 55, 73, 73), SKY)
    return pencil.finished()


def snail() -> Image.Image:
    """A snail: a sandy foot with two feelers to the left, a house of sky and night blue rings."""
    pencil = Pencil()
    pencil.polygon((20, 64, 8, 26, 14, 24, 30, 62), SAND_DARK)
    pencil.polygon((32, 62, 30, 24, 36, 24, 42, 62), SAND_DARK)
    pencil.ellipse((5, 16, 19, 30), COAL)
    pencil.ellipse((26, 14, 40, 28), COAL)
    pencil.box((8, 54, 48, 112), SAND, radius=18)
    pencil.box((8, 90, 124, 112), SAND, radius=11)
    pencil.ellipse((40, 24, 118, 102), NIGHT)
    pencil.ellipse((50, 36, 106, 92), SKY)
    pencil.ellipse((61, 48, 95, 82), NIGHT)
    pencil.ellipse((72, 59, 84, 71), CREAM)
    return pencil.finished()


SPRITES = (robot, teapot, rocket, snail)


def known(shape: str, colour: str) -> Image.Image:
    """One of the world's own shapes in one of its colours."""
    picture = Image.new("RGBA", (SIDE, SIDE), (*COLOURS[colour], 255))
    picture.putalpha(shape_mask(shape, SIDE, (SIDE / 2, SIDE / 2), SIDE / 2 - 4))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sprites", help="folder for the PNG files")
    parser.add_argument("--shape", choices=SHAPES, help="of the world, in place of the demo sprites")
    parser.add_argument("--colour", choices=COLOURS, default="yellow", help="of the shape (default yellow)")
    args = parser.parse_args()
    sprites = {draw.__name__: draw for draw in SPRITES}
    if args.shape:
        sprites = {f"{args.colour}_{args.shape}": partial(known, args.shape, args.colour)}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in sprites.items():
        draw().save(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
