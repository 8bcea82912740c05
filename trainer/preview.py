"""Pictures drawn from the saved archive, by the code that predict uses: the base model's beside the adapted one's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from preprocessing.settings import Mode
from trainer import families
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator
from trainer.report import Preview

DEFAULT_PROMPTS: dict[Mode, tuple[str, ...]] = {
    "subject": (
        "a photo of {trigger}",
        "{trigger} on a beach at sunset",
        "a painting of {trigger}",
        "a photo of a dog",
    ),
    "face": (
        "a photo of {trigger}, looking into the camera",
        "a photo of {trigger} in a raincoat, in a city at night",
        "an oil painting of {trigger}",
        "a photo of an old man reading a newspaper",
    ),
    "style": (
        "a lighthouse on a cliff, in the style of {trigger}",
        "a bowl of fruit, in the style of {trigger}",
        "a woman with a dog, in the style of {trigger}",
        "a photo of a lighthouse on a cliff",
    ),
}


def prompts_of(settings: JobSettings) -> list[str]:
    """The previews' prompts, with {trigger} filled in; the last default one shows what happens to other subjects."""
    chosen = settings.preview_prompts
    if chosen is None:
        usual = DEFAULT_PROMPTS[settings.mode]
        # A base model's own prompts are about a subject.
        own = families.recommended(settings.base_model, "draw") if settings.mode == "subject" else {}
        chosen = own.get("preview_prompts", usual)
    return [prompt.replace("{trigger}", settings.trigger_word) for prompt in chosen]


def trained_size(settings: JobSettings, generator: Generator) -> dict[str, int]:
    """Width and height of a square picture of the trained resolution, as the model can draw it."""
    stride = generator.geometry.stride
    side = max(stride, settings.resolution // stride * stride)
    return {"width": side, "height": side}


def draw_previews(archive: Path, settings: JobSettings, progress: Callable[[str, int, int], None]) -> list[Preview]:
    """Draw every prompt with every preview seed, without and with the archive, into output_dir/samples."""
    folder = settings.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    jobs = [(prompt, seed) for prompt in prompts_of(settings) for seed in settings.preview_seeds]
    prompts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
    generator = Generator(settings.base_model, companion=settings.companion_model)
    drawing = DrawSettings(prompt=prompts[0], **trained_size(settings, generator))
    drawn = {}
    for step, name in enumerate(("base", "adapted")):
        if name == "adapted":
            generator.use(archive)
        drawn[name] = generator.draw_prompts(prompts, seeds, drawing)
        progress("preview", step + 1, 2)
    previews = []
    for i, (prompt, seed) in enumerate(jobs):
        paths = {name: folder / f"{i:02d}_{name}.png" for name in drawn}
        for name, path in paths.items():
            drawn[name][i].save(path)
        previews.append(Preview(prompt, seed, paths["base"], paths["adapted"]))
    return previews
