"""Finds a sprite in a picture: where it fits best, and how well it is drawn there in outline, colours and structure.

    every radius and stretch at every place, by correlation --> the best candidates
        --moved and resized by fractions of a pixel--> the best fit --> likeness

The background is the oracle's: a pixel outside the sprite may be any tone of it, so that neither the phase of the
stripes nor their edges count against a picture. A sprite of one colour has an outline only: a shape of its own colour
and outline is the sprite.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from toybox.oracle import Ground, fit_ground, pixels_of
from toybox.world import OVERSAMPLE, RADII, SIZE

MARGIN = 8  # pixels around the picture into which a sprite may reach
WIDE = SIZE + 2 * MARGIN
BORDER = 12  # no sprite's centre is nearer to the picture's edge
RADIUS_STEPS = 16
RADIUS_RANGE = (0.86 * min(RADII.values()), 1.12 * max(RADII.values()))
STRETCHES = (0.9, 1.0, 1.1)
BANDS = 4  # of radii, each with a candidate: where a sprite is much like the background, small ones misfit least
EDGE = 2  # pixels that a sprite's blurred edge may reach further than it does
BLUR = 0.9  # pixels; differences finer than this are no difference
SPRITE_SIDE = 2 * round(RADIUS_RANGE[1]) * OVERSAMPLE
ENERGY_FLOOR = 0.02  # squared RGB difference (0..1 each) that passes for noise where a sprite hardly stands out
MIN_LIKENESS = 0.78  # calibrated by `python -m toybox.score oracle`
VARIANCE_FLOOR = 0.02  # the same for a sprite of one colour, which has no structure to compare


@dataclass(frozen=True)
class Place:
    """Centre and half the longer side in pixels; `stretch` is width by height relative to the sprite's own."""

    x: float
    y: float
    radius: float
    stretch: float


@dataclass(frozen=True)
class Find:
    """The best fit. `outline` and `structure` are at most 1, and 1 for a perfect paste."""

    place: Place
    outline: float
    structure: float

    @property
    def likeness(self) -> float:
        """The weaker of the two, for a sprite is both."""
        return min(self.outline, self.structure)

    @property
    def found(self) -> bool:
        return self.likeness > MIN_LIKENESS


@functools.cache
def _smoothing(side: int) -> np.ndarray:
    """The matrix [side, side] that blurs a line of pixels; its rows sum to 1 at the edges too."""
    apart = np.subtract.outer(np.arange(side), np.arange(side))
    weights = np.exp(-(apart**2) / (2 * BLUR**2))
    weights[weights < 1e-6] = 0  # or the matrix holds denormal numbers, with which products take ten times as long
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def blur(values: np.ndarray) -> np.ndarray:
    """Gaussian blur of [side, side, C] along both axes."""
    smoothing = _smoothing(len(values))
    return np.einsum(
        "yh,hwc->ywc", smoothing, np.einsum("xw,hwc->hxc", smoothing, values, optimize=True), optimize=True
    )


@dataclass(frozen=True)
class _Scene:
    """A picture prepared for the search: pixels and the first and second tone's difference in 0..1, tone limits."""

    pixels: np.ndarray
    first: np.ndarray
    step: np.ndarray
    low: np.ndarray
    high: np.ndarray
    residue: np.ndarray  # what is not background, blurred

    def without(self, colours: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What remains of the picture when colours (premultiplied) lie over the background, and that background."""
        through = 1 - alpha
        rest = self.pixels - colours - through[..., None] * self.first
        tone = (rest @ self.step) / np.maximum(through * (self.step @ self.step), 1e-6)
        tone = tone.clip(self.low, self.high)
        return rest - (tone * through)[..., None] * self.step, self.first + tone[..., None] * self.step


class Finder:
    """Looks for one RGBA sprite (cropped to what is drawn) in pictures of the world."""

    def __init__(self, sprite: Image.Image):
        scale = SPRITE_SIDE / max(sprite.size)
        self._size = tuple(max(1, round(side * scale)) for side in sprite.size)
        resized = sprite.convert("RGBA").resize(self._size, Image.Resampling.LANCZOS)
        self._edge = SPRITE_SIDE // 2
        canvas = Image.new("RGBA", (self._size[0] + 2 * self._edge, self._size[1] + 2 * self._edge), (0, 0, 0, 0))
        canvas.paste(resized, (self._edge, self._edge))
        self._premultiplied = canvas.convert("RGBa")
        radii = np.geomspace(*RADIUS_RANGE, RADIUS_STEPS)
        middle = WIDE / 2
        self._places = [Place(middle, middle, float(r), stretch) for r in radii for stretch in STRETCHES]
        drawn = np.stack([self.draw(place, WIDE) for place in self._places])
        colours, alphas = (
            np.stack([blur(d[..., :3]) for d in drawn]),
            np.stack([blur(d[..., 3:])[..., 0] for d in drawn]),
        )
        energies = (colours**2).sum(-1) / np.maximum(alphas, 1e-4)
        self._alphas, self._energies = (np.conj(np.fft.rfft2(maps)) for maps in (alphas, energies))
        self._colours = np.conj(np.fft.rfft2(colours, axes=(1, 2)))
        inside = np.pad(np.ones((SIZE, SIZE), np.float32), MARGIN)
        self._inside = np.fft.rfft2(inside)

    def draw(self, place: Place, side: int = SIZE) -> np.ndarray:
        """The sprite alone on a `side` x `side` picture: premultiplied RGBA in 0..1, [side, side, 4]."""
        stretch = math.sqrt(place.stretch)
        width = 2 * place.radius * self._size[0] / max(self._size) * stretch
        height = 2 * place.radius * self._size[1] / max(self._size) / stretch
        out = np.zeros((side, side, 4), np.float32)
        left, top = max(0, math.floor(place.x - width / 2)), max(0, math.floor(place.y - height / 2))
        right, bottom = min(side, math.ceil(place.x + width / 2)), min(side, math.ceil(place.y + height / 2))
        if right <= left or bottom <= top:
            return out
        across, down = self._size[0] / width, self._size[1] / height
        box = (
            (left - place.x) * across + self._size[0] / 2 + self._edge,
            (top - place.y) * down + self._size[1] / 2 + self._edge,
            (right - place.x) * across + self._size[0] / 2 + self._edge,
            (bottom - place.y) * down + self._size[1] / 2 + self._edge,
        )
        piece = self._premultiplied.resize((right - left, bottom - top), Image.Resampling.BOX, box=box)
        out[top:bottom, left:right] = np.asarray(piece, np.float32) / 255
        return out

    def find(self, picture: Image.Image, ground: Ground | None = None, hidden: np.ndarray | None = None) -> Find:
        """The best fit of the sprite in an RGB picture; `ground` saves fitting the background again, and pixels that
        are `hidden` [64, 64] pass for background.
        """
        pixels = pixels_of(picture)
        ground = ground or fit_ground(pixels)
        if hidden is not None:
            pixels = np.where(hidden[..., None], ground.distances(pixels)[1], pixels)
        scene = _prepare(pixels, ground)
        place = min(self._candidates(scene), key=lambda p: self._misfit(scene, p))
        return self._judge(scene, self._settle(scene, place))

    def covered(self, place: Place) -> np.ndarray:
        """The pixels that the sprite and its blurred edge reach at a place: bool [64, 64]."""
        solid = Image.fromarray(self.draw(place)[..., 3] > 0)
        return np.asarray(solid.convert("L").filter(ImageFilter.MaxFilter(2 * EDGE + 1))) > 0

    def _candidates(self, scene: _Scene) -> list[Place]:
        """The best place of the coarse search in each of a few bands of radii."""
        pixels = blur(scene.pixels)
        taken = (pixels**2).sum(-1) - (scene.residue**2).sum(-1)
        taken, wide = np.pad(taken, MARGIN), np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
        products = np.fft.rfft2(taken) * self._alphas + self._inside * self._energies
        products -= 2 * np.einsum("yxc,kyxc->kyx", np.fft.rfft2(wide, axes=(0, 1)), self._colours)
        misfits = np.fft.fftshift(np.fft.irfft2(products, s=(WIDE, WIDE)), axes=(1, 2))
        first, side = MARGIN + BORDER, SIZE - 2 * BORDER
        inner = misfits[:, first : first + side, first : first + side].reshape(len(misfits), -1)
        places = []
        for band in np.array_split(np.arange(len(inner)), BANDS):
            index = int(band[inner[band].min(1).argmin()])
            y, x = divmod(int(inner[index].argmin()), side)
            places.append(replace(self._places[index], x=float(x + BORDER), y=float(y + BORDER)))
        return places

    def _misfit(self, scene: _Scene, place: Place) -> float:
        drawn = self.draw(place)
        return float((blur(scene.without(drawn[..., :3], drawn[..., 3])[0]) ** 2).sum())

    def _settle(self, scene: _Scene, place: Place) -> Place:
        """Move and resize by ever smaller steps for as long as the fit improves."""
        best = self._misfit(scene, place)
        for step in (1.0, 0.5):
            for name, amount in (("x", 0.5), ("y", 0.5), ("radius", 0.5), ("stretch", 0.05)):
                for sign in (1, -1):
                    moved = replace(place, **{name: getattr(place, name) + sign * step * amount})
                    misfit = self._misfit(scene, moved)
                    if misfit < best:
                        best, place = misfit, moved
                        break
        return place

    def _judge(self, scene: _Scene, place: Place) -> Find:
        drawn = self.draw(place)
        colours, alpha = drawn[..., :3], drawn[..., 3]
        rest, behind = scene.without(colours, alpha)
        misfit = float((blur(rest) ** 2).sum())
        contrast = float((blur(colours - alpha[..., None] * behind) ** 2).sum())
        energy = max(contrast, float((scene.residue**2).sum()))
        area = float(alpha.sum())
        outline = 1 - misfit / (energy + ENERGY_FLOOR * area)
        expected = colours + (1 - alpha[..., None]) * behind
        return Find(place, outline, _structure(blur(scene.pixels), blur(expected), alpha))


def find_pair(finders: tuple[Finder, Finder], picture: Image.Image) -> tuple[Find, Find]:
    """Two sprites in one RGB picture, of which `find` sees neither where both are, for either is much that the other
    does not explain. Each fits best in the whole picture, or with the pixels hidden that the other one covers; that
    one must then be found with the first one's hidden, so that a sprite hides nothing where it is not.
    """
    ground = fit_ground(pixels_of(picture))
    alone = [finder.find(picture, ground) for finder in finders]
    finds = list(alone)
    for first, second in ((0, 1), (1, 0)):
        beside = finders[second].find(picture, ground, finders[first].covered(alone[first].place))
        if beside.found:
            own = finders[first].find(picture, ground, finders[second].covered(beside.place))
            finds[first] = max(finds[first], own, key=lambda find: find.likeness)
            finds[second] = max(finds[second], beside, key=lambda find: find.likeness)
    return finds[0], finds[1]


def _prepare(pixels: np.ndarray, ground: Ground) -> _Scene:
    first, step = ground.tones
    low, high = ground.limits
    bare = _Scene(pixels / 255, first / 255, step / 255, low, high, np.zeros(0))
    rest, _ = bare.without(np.zeros_like(pixels), np.zeros(pixels.shape[:2], np.float32))
    return replace(bare, residue=blur(rest))


def _structure(seen: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> float:
    """Likeness of contrasts inside the sprite: the structure term of SSIM (Wang et al. 2004), at most 1."""
    share = (weights / max(float(weights.sum()), 1e-6))[..., None]
    seen, expected = seen - (share * seen).sum((0, 1)), expected - (share * expected).sum((0, 1))
    covariance = float((share * seen * expected).sum())
    variances = float((share * (seen**2 + expected**2)).sum())
    return (2 * covariance + VARIANCE_FLOOR) / (variances + VARIANCE_FLOOR)
