"""Every picture that a finished job draws: asked for one by one, drawn together, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator


@dataclass(frozen=True)
class Wish:
    """A picture: `strength` is that of the weights, None the base model without them."""

    prompt: str
    seed: int
    strength: float | None = 1.0


Drawn = dict[Wish, Image.Image]


def strength_only(strength: float | None) -> dict[str, Any]:
    """Weights at a strength, and nothing else."""
    return {} if strength is None else {"lora_scale": strength}


def drawn(
    job: JobSettings,
    archive: Path,
    wishes: Iterable[Wish],
    progress: Callable[[int, int], None] = lambda done, of: None,
    drawn_at: Callable[[float | None], dict[str, Any]] = strength_only,
) -> Drawn:
    """All wishes from the saved archive of a job at its trained size, by the code that `predict` uses. `drawn_at` says
    how the archive's weights draw at a strength, or the base model at None (values of DrawSettings).
    """
    by_strength: dict[float | None, list[Wish]] = {None: []}
    for wish in dict.fromkeys(wishes):
        by_strength.setdefault(wish.strength, []).append(wish)
    generator = Generator(job.base_model, companion=job.companion_model, precision=job.base_precision)
    stride = generator.geometry.stride
    side = max(stride, job.resolution // stride * stride)
    found, total = {}, sum(map(len, by_strength.values()))
    for strength, group in by_strength.items():  # the base model's first
        if strength is not None and not generator.archives:
            generator.use(archive)
        if not group:
            continue
        settings = DrawSettings(prompt="", width=side, height=side, **drawn_at(strength))
        pictures = generator.draw_prompts([wish.prompt for wish in group], [wish.seed for wish in group], settings)
        found |= dict(zip(group, pictures, strict=True))
        progress(len(found), total)
    return found
