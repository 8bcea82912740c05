"""Pictures drawn from the saved archive, by the code that predict uses: the base model's beside the adapted ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preprocessing.prepared import PreparedDataset
from preprocessing.settings import Mode
from trainer import families, methods
from trainer.config import JobSettings
from trainer.evaluation.exhibit import Exhibit, Seen, look, refuse_blank
from trainer.evaluation.gallery import Wish, drawn
from trainer.evaluation.split import split
from trainer.generate import PIPELINE_DEFAULTS
from trainer.report import Preview

TRIGGER = "{trigger}"
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
    "captions": (
        "a photo of a cat",
        "a red sports car on a highway",
        "a beautiful sunset over the ocean",
        "a green forest with tall trees",
    ),
}


def prompts_of(settings: JobSettings) -> list[str]:
    """The previews' prompts, with {trigger} filled in; the last default one shows what happens to other subjects.

    Of several concepts each has its own of every prompt with a trigger, and by default one shows them together.
    """
    chosen = settings.preview_prompts
    if chosen is None:
        usual = DEFAULT_PROMPTS[settings.mode]
        # A base model's own prompts are about a subject, or about all that it can draw.
        has_own = settings.mode in ("subject", "captions")
        own = families.recommended(settings.base_model, "draw") if has_own else {}
        chosen = own.get("preview_prompts", usual)
    triggers = [one.trigger_word for one in settings.taught]
    if len(triggers) == 1:
        return [prompt.replace(TRIGGER, triggers[0]) for prompt in chosen]
    about = [prompt for prompt in chosen if TRIGGER in prompt]
    filled = [prompt.replace(TRIGGER, one) for one in triggers for prompt in about]
    if settings.preview_prompts is None:
        filled += [prompt.replace(TRIGGER, " and ".join(triggers)) for prompt in about[:1]]
    return [*filled, *(prompt for prompt in chosen if prompt not in about)]


FROM_CONDITIONS = (
    "Near copies and variety are not told: the pictures are drawn from a condition made of one of the data set, which "
    "they are meant to resemble. Strengths are those of the condition, and the base model draws without it."
)


FROM_REFERENCE = (
    "Near copies and variety are not told: the pictures, also those of the base model, are drawn from the reference of "
    "one of the data set, which they are meant to resemble."
)


@dataclass(frozen=True)
class Gallery:
    """What a finished job drew. `grid` has, by seed and prompt, the base model's picture and one for each strength."""

    previews: list[Preview]
    strengths: tuple[float, ...]
    grid: dict[int, dict[str, list[Path]]]
    nearest: list[tuple[Path, int, float]]  # sample, index of the nearest picture in the data set, distance
    seen: Seen
    extra_share: float  # of the pictures, those beyond the previews
    remarks: tuple[str, ...] = ()  # on what could not be drawn or told


def draw_gallery(
    archive: Path, dataset: PreparedDataset, settings: JobSettings, progress: Callable[[str, int, int], None]
) -> Gallery:
    """Draw previews, grid and more from the archive into output_dir/samples, and look at them; nothing, where the other
    half of the base model is missing.

    Raises UserError where the weights draw nothing.
    """
    folder = settings.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    own = families.recommended(settings.base_model, "draw")
    steps = own.get("num_inference_steps", PIPELINE_DEFAULTS["num_inference_steps"])
    method = methods.create(settings)
    shown = next(iter(split(dataset, settings).held_out), 0)  # at best what no step has seen
    prompts = prompts_of(settings)
    reference = _reference(dataset, shown, settings)
    resembles = method.draws_from_conditions or bool(reference)
    if resembles and settings.preview_prompts is None:
        prompts = [dataset.items[shown].caption]
    exhibit = Exhibit.of(prompts, settings, steps, method.has_strength)
    wishes = list(dict.fromkeys(exhibit.wishes()))
    try:
        pictures = drawn(
            settings,
            archive,
            wishes,
            lambda done, of: progress("preview", done, of),
            lambda strength: (
                reference | ({} if strength is None else method.drawing_settings(dataset, shown, folder, strength))
            ),
        )
    except families.NoCompanion as error:  # the weights are finished all the same
        remark = f"No pictures were drawn: {error}"
        print(f"warning: {remark}", file=sys.stderr)
        return Gallery([], (), {}, [], Seen((), None, None), 0.0, (remark,))
    paths, previews = _named(exhibit, wishes, folder)
    for wish, picture in pictures.items():
        picture.save(paths[wish])
    refuse_blank(pictures, [wish for wish in wishes if wish.strength == 1])
    if resembles:
        seen, remarks = Seen((), None, None), (FROM_REFERENCE if reference else FROM_CONDITIONS,)
    else:
        seen, remarks = look(pictures, exhibit, dataset), ()
    return Gallery(
        previews=previews,
        strengths=exhibit.strengths,
        grid={
            seed: {prompt: [paths[wish] for wish in row] for prompt, row in exhibit.rows(seed).items()}
            for seed in exhibit.grid_seeds
        },
        nearest=[(paths[wish], found.picture, found.distance) for wish, found in seen.neighbours],
        seen=seen,
        extra_share=1 - 2 * len(exhibit.previews) / len(wishes),
        remarks=remarks,
    )


def _reference(dataset: PreparedDataset, picture: int, settings: JobSettings) -> dict[str, Any]:
    """What a model of references draws a picture of the data set from, adapted or not: values of DrawSettings."""
    paths = dataset.items[picture].conditions
    if not paths or not families.family_class(settings.base_model).takes_reference:
        return {}
    return {"condition": (dataset.folder / paths[0],)}


def _named(exhibit: Exhibit, wishes: list[Wish], folder: Path) -> tuple[dict[Wish, Path], list[Preview]]:
    """A file for each picture, and the pairs before and after among them."""
    paths = {wish: folder / f"{i:02d}_{_kind(wish)}.png" for i, wish in enumerate(wishes)}
    previews = []
    for i, wish in enumerate(exhibit.previews):
        base = replace(wish, strength=None)
        paths |= {base: folder / f"{i:02d}_base.png", wish: folder / f"{i:02d}_adapted.png"}
        previews.append(Preview(wish.prompt, wish.seed, paths[base], paths[wish]))
    return paths, previews


def _kind(wish: Wish) -> str:
    return "base" if wish.strength is None else f"at_{wish.strength}"
