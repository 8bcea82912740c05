"""The oracle: what a 64x64 picture of the world shows, found by comparing it with what the renderer draws.

    picture --fit of 12 colours x 4 patterns--> background
            --distance to it, vote of the palette--> the object's colour and soft mask
            --overlap with 15 shapes x 9 radii at every place--> shape, size, position

It never sees the prompt: a picture is named first and compared with the prompt afterwards. An attribute that cannot
be named with confidence is None, which agrees with no prompt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from toybox.palette import COLOURS, second_tone
from toybox.shapes import SHAPES, shape_mask
from toybox.world import CENTRES, OVERSAMPLE, PATTERNS, RADII, SIZE, Background, Scene, draw_background

PHASES = 24  # steps at which the fit tries the phase of stripes and dots
FIT_CAP = 60.0  # a pixel further than this from a background (in RGB units) costs no more: it may be the object
FINALISTS = 4  # colours whose patterns are tried, after a first look at the tones alone
SLACK = {"plain": 0.15, "striped": 1.0, "dotted": 1.0, "gradient": 0.2}  # how far a tone may be from the fitted one
OBJECT_DISTANCE = 32.0  # a pixel this far from the background belongs to the object
COLOUR_DISTANCE = 60.0  # a pixel further than this from every palette colour has no name
FOREIGN_DISTANCE = 45.0  # a pixel this far from every blend of object and background belongs to neither
SCALES = (0.92, 1.0, 1.08)  # radii tried around each of the world's
MIN_PIXELS = 30  # the smallest object of the world, a small bolt, covers 110

# Calibrated by `python -m toybox.score oracle`.
MAX_BACKGROUND_COST = 0.5  # mean capped cost of the best fit: at least half of the picture is background
MIN_PURITY = 0.3  # share of the object that is nearest to its colour; the rest of a small shape is blurred edge
MAX_FOREIGN = 0.12
MIN_OVERLAP = 0.85
MAX_OFF_CENTRE = 6.0  # pixels, half the way between two of the world's positions


@dataclass(frozen=True)
class Ground:
    """A fitted background: `tone` [64, 64] in 0..1 runs from the colour to its second tone."""

    pattern: str
    colour: str
    tone: np.ndarray
    cost: float

    @property
    def known(self) -> bool:
        """Whether the picture has such a background at all."""
        return self.cost < MAX_BACKGROUND_COST

    @property
    def tones(self) -> tuple[np.ndarray, np.ndarray]:
        """The colour [3] and the step to its second tone [3], in 0..255."""
        index = list(COLOURS).index(self.colour)
        return _tones()[0][index], _tones()[1][index]

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest tone that each pixel may have, [64, 64] in 0..1."""
        slack = SLACK[self.pattern]
        return np.maximum(self.tone - slack, 0), np.minimum(self.tone + slack, 1)

    def distances(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far pixels [64, 64, 3] are from the background [64, 64], and the background they are nearest to."""
        first, step = self.tones
        nearest = ((pixels - first) @ step / (step @ step)).clip(*self.limits)
        behind = first + nearest[..., None] * step
        return np.linalg.norm(pixels - behind, axis=-1), behind


@dataclass(frozen=True)
class Sight:
    """What the oracle sees. `overlap` (0..1) says how well the shape fits; None is what it cannot name."""

    pattern: str | None
    ground: str | None
    colour: str | None
    shape: str | None
    size: str | None
    position: str | None
    overlap: float


@functools.cache
def _tones() -> tuple[np.ndarray, np.ndarray]:
    """The palette [12, 3] and the step from each colour to its second tone [12, 3]."""
    first = np.array(list(COLOURS.values()), np.float32)
    return first, np.array([second_tone(name) for name in COLOURS], np.float32) - first


@functools.cache
def _patterns() -> tuple[list[str], np.ndarray]:
    """The pattern of each template and the templates: how much of the second tone a pixel holds, [K, 64, 64]."""
    names, templates = [], []
    first, step = np.array(COLOURS["black"], np.float32), _tones()[1][list(COLOURS).index("black")]
    for pattern in PATTERNS:
        for phase in range(PHASES if pattern in ("striped", "dotted") else 1):
            drawn = draw_background(Background(pattern, "black", phase / PHASES)).reduce(OVERSAMPLE)
            names.append(pattern)
            templates.append((np.asarray(drawn, np.float32) - first) @ step / (step @ step))
    return names, np.stack(templates)


def fit_ground(pixels: np.ndarray) -> Ground:
    """The background that explains most of the picture, float32 [64, 64, 3] in 0..255."""
    first, step = _tones()
    lengths = (step * step).sum(-1)
    rows = pixels[::2]  # half of them say it all, in half the time
    shares = (rows @ step.T - (first * step).sum(-1)) / lengths
    apart = (rows * rows).sum(-1, keepdims=True) - 2 * rows @ first.T + (first * first).sum(-1)
    # Squared distance to each colour's line of tones, by Pythagoras.
    beside = np.maximum(apart - shares**2 * lengths, 0)
    beyond = (shares - shares.clip(0, 1)) ** 2 * lengths
    quick = np.minimum(beside + beyond, FIT_CAP**2).mean((0, 1))
    names, templates = _patterns()
    best = Ground("", "", templates[0], np.inf)
    for index in np.argsort(quick)[:FINALISTS]:
        along = (shares[..., index] - templates[:, ::2]) ** 2 * lengths[index]
        costs = np.minimum(along + beside[..., index], FIT_CAP**2).mean((1, 2)) / FIT_CAP**2
        winner = int(costs.argmin())
        if costs[winner] < best.cost:
            best = Ground(names[winner], list(COLOURS)[index], templates[winner], float(costs[winner]))
    return best


def _name_colour(pixels: np.ndarray, apart: np.ndarray, ground: str) -> tuple[str | None, float]:
    """The palette colour that most object pixels are nearest to, and the share of them that are (0..1)."""
    core = pixels[apart > OBJECT_DISTANCE]
    if len(core) < MIN_PIXELS:
        return None, 0.0
    distances = np.linalg.norm(core[:, None] - _tones()[0], axis=-1)
    nearest = distances.argmin(1)
    votes = np.bincount(nearest[distances.min(1) < COLOUR_DISTANCE], minlength=len(COLOURS))
    votes[list(COLOURS).index(ground)] = 0
    return list(COLOURS)[int(votes.argmax())], float(votes.max() / len(core))


def _soft_mask(pixels: np.ndarray, apart: np.ndarray, behind: np.ndarray, colour: str) -> tuple[np.ndarray, float]:
    """How much of the object each pixel holds, [64, 64] in 0..1, and the share of pixels of some third colour.

    The share is relative to the object's area.
    """
    towards = np.array(COLOURS[colour], np.float32) - behind
    share = ((pixels - behind) * towards).sum(-1) / np.maximum((towards * towards).sum(-1), 1.0)
    blend = behind + share.clip(0, 1)[..., None] * towards
    foreign = np.linalg.norm(pixels - blend, axis=-1) > FOREIGN_DISTANCE
    to_object = np.linalg.norm(pixels - np.array(COLOURS[colour], np.float32), axis=-1)
    mask = apart**2 / (apart**2 + to_object**2 + 1e-3)
    return mask, float(foreign.sum() / max(1.0, mask.sum()))


@dataclass(frozen=True)
class _Templates:
    """Every shape at every radius, centred on (32, 32): names, radii, transforms [K, 64, 33], energies [K]."""

    shapes: list[str]
    sizes: list[str]
    transforms: np.ndarray
    energies: np.ndarray


@functools.cache
def _shape_templates() -> _Templates:
    shapes, sizes, masks = [], [], []
    middle = SIZE / 2 * OVERSAMPLE
    for shape in SHAPES:
        for size, radius in RADII.items():
            for scale in SCALES:
                drawn = shape_mask(shape, SIZE * OVERSAMPLE, (middle, middle), radius * scale * OVERSAMPLE)
                shapes.append(shape)
                sizes.append(size)
                masks.append(np.asarray(drawn.reduce(OVERSAMPLE), np.float32) / 255)
    stack = np.stack(masks)
    return _Templates(shapes, sizes, np.conj(np.fft.rfft2(stack)), (stack**2).sum((1, 2)))


def match_shape(mask: np.ndarray) -> tuple[str, str, tuple[float, float], float]:
    """The shape, size, centre (x, y in pixels) and overlap (Dice, 0..1) of the template that fits `mask` best."""
    templates = _shape_templates()
    energy = float((mask**2).sum())
    # Dice is at most 2 sqrt(e1 e2) / (e1 + e2): templates of a very different area need not be tried.
    near = np.flatnonzero(np.abs(np.log(templates.energies / energy)) < 0.8)
    if not len(near):
        near = np.array([np.abs(np.log(templates.energies / energy)).argmin()])
    products = np.fft.irfft2(np.fft.rfft2(mask) * templates.transforms[near], s=mask.shape)
    overlaps = 2 * products / (templates.energies[near, None, None] + energy)
    best, y, x = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
    centre = tuple(float((shift + SIZE // 2) % SIZE) for shift in (x, y))
    index = int(near[best])
    return templates.shapes[index], templates.sizes[index], centre, float(overlaps[best, y, x])


def nearest_position(centre: tuple[float, float]) -> str | None:
    """The world's position nearest to `centre` (x, y in pixels), None where none is near."""
    name, distance = min(
        ((name, float(np.hypot(centre[0] - x, centre[1] - y))) for name, (x, y) in CENTRES.items()),
        key=lambda pair: pair[1],
    )
    return name if distance < MAX_OFF_CENTRE else None


def object_centre(pixels: np.ndarray, ground: Ground) -> tuple[float, float] | None:
    """Centre (x, y in pixels) of the box around what is not background, a few stray pixels aside; None: nothing."""
    mask = ground.distances(pixels)[0] > OBJECT_DISTANCE
    if mask.sum() < MIN_PIXELS:
        return None
    rows, columns = np.nonzero(mask)
    (left, right), (top, bottom) = np.quantile(columns, (0.02, 0.98)), np.quantile(rows, (0.02, 0.98))
    return float(left + right + 1) / 2, float(top + bottom + 1) / 2


def pixels_of(picture: Image.Image) -> np.ndarray:
    """An RGB picture of the world's size as float32 [64, 64, 3] in 0..255; another size is resized to it."""
    rgb = picture.convert("RGB")
    if rgb.size != (SIZE, SIZE):
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(rgb, np.float32)


def agreement(sight: Sight, scene: Scene) -> dict[str, bool]:
    """Whether each attribute that the scores count is as the scene has it; background: pattern and colour both."""
    return {
        "shape": sight.shape == scene.shape,
        "colour": sight.colour == scene.colour,
        "background": (sight.pattern, sight.ground) == (scene.background.pattern, scene.background.colour),
        "position": sight.position == scene.position,
    }


def look(picture: Image.Image) -> Sight:
    """Name what the picture shows."""
    pixels = pixels_of(picture)
    ground = fit_ground(pixels)
    pattern, ground_colour = (ground.pattern, ground.colour) if ground.known else (None, None)
    apart, behind = ground.distances(pixels)
    colour, purity = _name_colour(pixels, apart, ground.colour)
    if colour is None:
        return Sight(pattern, ground_colour, None, None, None, None, 0.0)
    mask, foreign = _soft_mask(pixels, apart, behind, colour)
    shape, size, centre, overlap = match_shape(mask)
    whole = purity > MIN_PURITY and foreign < MAX_FOREIGN
    sure = whole and overlap > MIN_OVERLAP
    return Sight(
        pattern=pattern,
        ground=ground_colour,
        colour=colour if whole else None,
        shape=shape if sure else None,
        size=size if sure else None,
        position=nearest_position(centre),
        overlap=overlap,
    )
