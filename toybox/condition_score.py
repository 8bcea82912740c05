"""How far weights of method condition obey the condition they are given: by the oracle, and by the pixels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from toybox.captions import caption
from toybox.prompts import base_scenes, picture_seeds
from toybox.score import Pictures, Table, shares
from toybox.world import SIZE, render

if TYPE_CHECKING:
    from trainer.generate import Generator

NEAR = np.ones((3, 3), np.uint8)  # an edge that is one pixel off is obeyed


def edges_obeyed(drawn: Image.Image, wanted: Image.Image) -> float:
    """F1 (0..1) of the Canny edges of `drawn` against those of `wanted`, both RGB and of one size."""
    from trainer.condition_tasks import CANNY

    found, asked = (cv2.Canny(np.asarray(picture), *CANNY) > 0 for picture in (drawn, wanted))
    if not found.any() or not asked.any():
        return float(not found.any() and not asked.any())
    precision, recall = (
        (one & cv2.dilate(other.astype(np.uint8), NEAR).astype(bool)).sum() / one.sum()
        for one, other in ((found, asked), (asked, found))
    )
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def known_kept(drawn: Image.Image, wanted: Image.Image, hole: Image.Image) -> float:
    """How alike (1: equal, 0: as far apart as can be) two RGB pictures are where `hole` is black."""
    apart = np.abs(np.asarray(drawn, dtype=float) - np.asarray(wanted, dtype=float)).mean(axis=2) / 255
    return float(1 - apart[np.asarray(hole) == 0].mean())


def right_half() -> Image.Image:
    """What is to be drawn for fill: white, the left half is known."""
    hole = Image.new("L", (SIZE, SIZE))
    hole.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    return hole


def score_condition(generator: Generator, weights: Path, count: int, told: bool = False) -> Table:
    """Rows "without" and "with" the weights: how often (0..1) each attribute is that of the scene whose picture is the
    condition, how far its edges are obeyed and its left half is kept (0..1). The prompt is empty or, if `told`, the
    scene's caption, as for conditions that leave something open.
    """
    from trainer.condition_tasks import task
    from trainer.drawing import DrawSettings

    scenes, seeds, hole = base_scenes(count), picture_seeds(count), right_half()
    wanted, prompts = [render(scene) for scene in scenes], [caption(scene) if told else "" for scene in scenes]
    before = generator.draw_prompts(prompts, seeds, DrawSettings(prompt=""))
    generator.use(weights)
    tasks = [task(name) for name in generator.manifests[0].settings["condition_tasks"]]
    after: Pictures = []
    with tempfile.TemporaryDirectory() as folder:
        path, mask = Path(folder) / "scene.png", Path(folder) / "mask.png"
        hole.save(mask)
        filled = mask if any(one.has_holes for one in tasks) else None
        for picture, prompt, seed in zip(wanted, prompts, seeds, strict=True):
            picture.save(path)
            # what the weights draw, and not what is put back afterwards
            chosen = DrawSettings(prompt="", condition=(path,) * len(tasks), mask=filled, keep_known=False)
            after += generator.draw_prompts([prompt], [seed], chosen)
    return {name: _row(drawn, wanted, hole) for name, drawn in (("without", before), ("with", after))}


def _row(drawn: Pictures, wanted: Pictures, hole: Image.Image) -> dict[str, float]:
    pairs = list(zip(drawn, wanted, strict=True))
    return shares(drawn, base_scenes(len(drawn))) | {
        "edges": round(float(np.mean([edges_obeyed(*pair) for pair in pairs])), 4),
        "known": round(float(np.mean([known_kept(*pair, hole) for pair in pairs])), 4),
    }
