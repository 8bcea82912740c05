"""Pictures drawn from the saved archive, by the code that predict uses: the base model's beside the adapted one's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from preprocessing.prepared import PreparedDataset
from preprocessing.settings import Mode
from trainer import families
from trainer.condition_tasks import Task, task
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator
from trainer.methods import METHODS
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


def _drawn_from(settings: JobSettings, prompt: str, folder: Path) -> DrawSettings:
    """How the adapted model draws: by the prompt or, where the method says so, from the first prepared picture too."""
    if not METHODS[settings.method].draws_from_conditions:
        return DrawSettings(prompt=prompt)
    dataset = PreparedDataset.load(settings.output_dir / "prepared")
    item, tasks = dataset.items[0], [task(name) for name in settings.condition_tasks]
    uploaded = [dataset.folder / path for path in item.conditions]
    pictures = tuple(
        uploaded[i] if one.paired and i < len(uploaded) else dataset.folder / item.image for i, one in enumerate(tasks)
    )
    mask = None
    if any(type(one).hole is not Task.hole for one in tasks):
        mask = folder / "mask.png"
        right = Image.new("L", item.size, 0)
        right.paste(255, (item.size[0] // 2, 0, *item.size))
        right.save(mask)
    width, height = item.size
    return DrawSettings(prompt=prompt, condition=pictures, mask=mask, width=width, height=height)


def draw_previews(archive: Path, settings: JobSettings, progress: Callable[[str, int, int], None]) -> list[Preview]:
    """Draw every prompt with every preview seed, without and with the archive, into output_dir/samples."""
    folder = settings.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    jobs = [(prompt, seed) for prompt in prompts_of(settings) for seed in settings.preview_seeds]
    prompts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
    generator = Generator(settings.base_model)
    drawn = {"base": generator.draw_prompts(prompts, seeds, DrawSettings(prompt=prompts[0]))}
    progress("preview", 1, 2)
    generator.use(archive)
    drawn["adapted"] = generator.draw_prompts(prompts, seeds, _drawn_from(settings, prompts[0], folder))
    progress("preview", 2, 2)
    previews = []
    for i, (prompt, seed) in enumerate(jobs):
        paths = {name: folder / f"{i:02d}_{name}.png" for name in drawn}
        for name, path in paths.items():
            drawn[name][i].save(path)
        previews.append(Preview(prompt, seed, paths["base"], paths["adapted"]))
    return previews
