"""The door to drawing.

    python predict.py --weights outputs/x/trained_model.tar --prompt "a photo of TOK" --num_outputs 4
    python predict.py --prompt "a big red star"                       the base model alone
    python predict.py --weights ... --prompt_file prompts.txt         a prompt a line, named after their prompts

`Predictor` is the same for Cog. Cog reads the signature of `run` from the source without running it, so defaults,
bounds and choices are written out as literals; a test holds them equal to PredictSettings.
"""

import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path as LocalPath
from typing import TYPE_CHECKING, Any, List, Literal, Optional

from cog import BaseRunner, Input, Path
from pydantic import Field, model_validator

from preprocessing.errors import UserError, redacted
from trainer import cancel, commandline, hosted
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.weights_cache import WeightsCache

if TYPE_CHECKING:
    from PIL import Image

    from trainer.generate import Generator
    from trainer.weights_cache import Held

SENT_BY_NOW = 600  # seconds after which an answer's files have been sent; Cog's own time-out is 25
DEFAULT_BASE = JobSettings.model_fields["base_model"].default

LONGEST_SLUG = 50  # characters of a prompt in a file's name
SCHEDULERS = ["ddim", "ddpm", "euler", "euler_ancestral", "dpmsolver++", "unipc"]

hosted.redact_downloads()  # here, for Cog calls nothing of ours before it downloads


class PredictSettings(DrawSettings):
    """Where the weights come from and the pictures go."""

    weights: str | None = Field(
        None,
        description="A trained_model.tar, its folder, a LoRA as .safetensors, a URL or a Hub id; null: the base alone.",
    )
    base_model: str | None = Field(None, description="Null: the one that the weights were trained on.")
    companion_weights: str | None = Field(
        None, description="Weights of the other half too, of a model in two halves (Kandinsky 2.2): as weights."
    )
    companion_model: str | None = Field(
        None, description="The other half of such a model. Null: what the weights name, or the published one."
    )
    base_precision: Literal["same", "int8", "nf4"] = Field(
        "same", description="Of the base model's denoiser: 8 or 4 bits need less memory, and bitsandbytes."
    )
    more_weights: tuple[str, ...] | None = Field(
        None, description="Further weights at once: of other conditions, or a style's LoRA beside those of conditions."
    )
    output_dir: LocalPath = Field(LocalPath("outputs/predict"), description="Folder for the pictures.")


class CommandSettings(PredictSettings):
    """What only the command line takes."""

    prompt: str | None = Field(None, description="What to draw; the trigger word calls the subject.")
    prompt_file: LocalPath | None = Field(
        None, description="In place of prompt: a text file with a prompt on each line; num_outputs pictures of each."
    )

    @model_validator(mode="before")
    @classmethod
    def _condition_alone(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A condition may say all that is to be drawn, so its prompt may be left out or empty."""
        told = any(values.get(name) is not None for name in ("prompt", "prompt_file"))
        return values if told or not values.get("condition") else values | {"prompt": ""}

    @model_validator(mode="after")
    def _one_of_two(self) -> "CommandSettings":
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("prompt is missing: give --prompt TEXT, or --prompt_file PATH, and not both")
        return self

    def prompts(self) -> list[str]:
        """The lines of prompt_file that are not empty; UserError where there are none."""
        try:
            lines = self.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt_file {self.prompt_file} cannot be read: give a text file in UTF-8.") from error
        if found := [line.strip() for line in lines if line.strip()]:
            return found
        raise UserError(f"prompt_file {self.prompt_file} is empty: write a prompt on each line.")


@dataclass(frozen=True)
class Opened:
    """Weights that lie unpacked in a folder, for as long as `keeping` is not closed."""

    key: str  # changes when the weights do
    base_model: str  # the one that they are for
    companion_model: str | None  # its other half, where it has one
    keeping: ExitStack


@dataclass(frozen=True)
class Wanted:
    """What a request draws with: weights as WeightsCache takes them, and models where they are not the weights' own."""

    weights: str | None = None
    base_model: str | None = None
    companion_weights: str | None = None
    companion_model: str | None = None
    more_weights: tuple[str, ...] | None = None
    base_precision: str = "same"


class Studio:
    """One Generator kept over many requests: base and weights are loaded only when they change.

    Which weights are in is asked of the generator and noted nowhere else: a cancel may come between any two lines.
    """

    def __init__(self) -> None:
        self.generator: Generator | None = None
        self.models: tuple[str, str | None, str] | None = None  # base and companion, and the precision
        self.opened: dict[LocalPath, Opened] = {}

    def ready(self, wanted: Wanted) -> "Generator":
        """A generator with the wanted weights (none: the base alone) on their own models, or on the given ones.

        After an error or a cancel the weights that were in are in still.
        """
        named = (wanted.weights, wanted.companion_weights, *(wanted.more_weights or ()))
        sources = [source for source in named if source is not None]
        try:
            if not sources:
                models = (wanted.base_model or DEFAULT_BASE, wanted.companion_model)
                generator = self._on(*models, wanted.base_precision)
                generator.release()
                return generator
            before = dict(self.opened)
            folders = [self._folder_of(source) for source in sources]
            first, *others = (self.opened[folder] for folder in folders)
            companion = others[0].base_model if wanted.companion_weights and others else first.companion_model
            models = (wanted.base_model or first.base_model, wanted.companion_model or companion)
            generator = self._on(*models, wanted.base_precision)
            known = all(before.get(folder) is self.opened[folder] for folder in folders)
            if not known or generator.archives != tuple(folders):
                generator.use(*folders)
            return generator
        finally:
            self._close_unused()

    def _folder_of(self, source: str) -> LocalPath:
        """Where the weights lie unpacked."""
        with ExitStack() as stack:
            held = stack.enter_context(WeightsCache.from_environment().held(source))
            known = next((folder for folder, one in self.opened.items() if one.key == held.key), None)
            return known or self._open(held, stack)

    def _open(self, held: "Held", stack: ExitStack) -> LocalPath:
        from trainer import foreign

        folder = stack.enter_context(foreign.unpacked(held.path))
        base = foreign.base_of(folder) or DEFAULT_BASE
        self.opened[folder] = Opened(held.key, base, foreign.companion_of(folder), stack.pop_all())
        return folder

    def _on(self, base_model: str, companion: str | None, precision: str) -> "Generator":
        """A generator with this base model."""
        models = (base_model, companion, precision)
        if self.generator is None or self.models != models:
            from trainer import families
            from trainer.generate import Generator

            families.family_class(base_model)  # a name that is none is told while the old one is still there
            self.generator = self.models = None  # free its memory before the next one is loaded
            self.generator = Generator(base_model, companion=companion, precision=precision)
            self.models = models
        return self.generator

    def _close_unused(self) -> None:
        for folder in self.opened.keys() - set(self.generator.archives if self.generator else ()):
            self.opened.pop(folder).keeping.close()

    def draw(self, settings: PredictSettings) -> tuple[int, list[LocalPath]]:
        """Draw and write the pictures; returns the first one's seed, and the files."""
        generator, settings, what = self._prepared(settings)
        return settings.seed, written(generator.draw(what), settings)

    def draw_each(self, prompts: list[str], settings: PredictSettings) -> tuple[int, list[LocalPath]]:
        """The same of several prompts, each with the seeds seed, seed + 1, ...; the files are named after them."""
        generator, settings, what = self._prepared(settings)
        count = settings.num_outputs
        wanted = [(i, prompt, j) for i, prompt in enumerate(prompts) for j in range(count)]
        pictures = generator.draw_prompts([one[1] for one in wanted], [settings.seed + one[2] for one in wanted], what)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        files = []
        for (i, prompt, j), picture in zip(wanted, pictures, strict=True):
            files.append(settings.output_dir / f"prompt_{i:03d}_img_{j:04d}_{slug(prompt)}.png")
            save(picture, files[-1], settings.model_copy(update={"prompt": prompt, "seed": settings.seed + j}))
        return settings.seed, files

    def _prepared(self, settings: PredictSettings) -> "tuple[Generator, PredictSettings, DrawSettings]":
        """The generator with the weights asked for, the settings with a seed, and what of them is about the picture."""
        if settings.more_scales and len(settings.more_scales) != len(settings.more_weights or ()):
            raise UserError("more_scales must have as many numbers as there are more_weights.")
        shown = [("condition", path) for path in settings.condition or ()]
        shown += [("references", path) for path in settings.references or ()]
        for name, path in (("image", settings.image), ("mask", settings.mask), *shown):
            if path and not path.is_file():
                raise UserError(f"{name} {path} does not exist: give the path of a picture")
        generator = self.ready(Wanted(**settings.model_dump(include={field.name for field in fields(Wanted)})))
        from trainer.generate import seed_of

        settings = settings.model_copy(update={"seed": seed_of(settings)})
        what = DrawSettings(**settings.model_dump(include=set(DrawSettings.model_fields)))
        return generator, settings, what


def written(pictures: "list[Image.Image]", settings: PredictSettings) -> list[LocalPath]:
    """Write each picture under the next free number, with the settings that drew it in its PNG text `atelier`.

    `settings.seed` must be set.
    """
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    numbers = (path.name.partition("_")[0] for path in settings.output_dir.glob("*_seed*.png"))
    taken = [int(number) for number in numbers if number.isdecimal()]
    files = []
    for i, picture in enumerate(pictures):
        seed = settings.seed + i
        files.append(settings.output_dir / f"{max(taken, default=0) + i + 1:04d}_seed{seed}.png")
        save(picture, files[-1], settings.model_copy(update={"seed": seed}))
    return files


def save(picture: "Image.Image", path: LocalPath, settings: PredictSettings) -> None:
    """Write a picture with the settings that draw it alone in its PNG text."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    # a picture is passed on, its text with it
    told = {name: redacted(getattr(settings, name) or "") or None for name in ("weights", "companion_weights")}
    told["more_weights"] = tuple(redacted(one) for one in settings.more_weights or ()) or None
    one = settings.model_copy(update={"num_outputs": 1} | told)
    text.add_itxt("atelier", one.model_dump_json(exclude_none=True, exclude={"output_dir", "prompt_file"}))
    picture.save(path, pnginfo=text)


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return "_".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:LONGEST_SLUG].strip("_") or "empty"


class Predictor(BaseRunner):
    """The same for Cog's server: the base model stays loaded between requests."""

    def setup(self, weights: Optional[str] = None) -> None:
        """Load the base model, and the weights that the container was given (COG_WEIGHTS), if any."""
        commandline.quiet_libraries()
        self.pictures = tempfile.TemporaryDirectory(prefix="atelier-")
        self.weights = weights or None
        self.studio = Studio()
        with hosted.told_shortly():
            self.studio.ready(Wanted(self.weights))

    def run(
        self,
        prompt: str = Input(description="What to draw; the trigger word calls the subject."),
        negative_prompt: str = Input(default="", description="What to keep away from."),
        replicate_weights: Optional[str] = Input(
            default=None, description="trained_model.tar or LoRA: URL, path or Hub id."
        ),
        base_model: Optional[str] = Input(default=None, description="Normally the one the weights were trained on."),
        companion_weights: Optional[str] = Input(
            default=None, description="Weights of a second half, as for the first."
        ),
        companion_model: Optional[str] = Input(
            default=None, description="The other half of a base model in two halves."
        ),
        more_weights: Optional[str] = Input(
            default=None, description="Of other conditions or of a style, too; spaces between."
        ),
        num_outputs: int = Input(default=1, ge=1, le=64, description="Pictures; each has the next seed."),
        width: Optional[int] = Input(default=None, ge=16, le=4096, description="In pixels."),
        height: Optional[int] = Input(default=None, ge=16, le=4096, description="In pixels."),
        guidance_scale: Optional[float] = Input(default=None, ge=0, le=50, description="Strictness about the prompt."),
        num_inference_steps: Optional[int] = Input(default=None, ge=1, le=1000, description="Denoising steps."),
        prior_guidance_scale: Optional[float] = Input(default=None, ge=0, le=50, description="Of a model's prior."),
        prior_num_inference_steps: Optional[int] = Input(
            default=None, ge=2, le=1000, description="Of a model's prior."
        ),
        image_guidance_scale: Optional[float] = Input(default=None, ge=0, le=50, description="Of the references."),
        temperature: Optional[float] = Input(
            default=None, ge=0, le=10, description="Of pixel_ar's choices; 0: likeliest."
        ),
        top_p: Optional[float] = Input(default=None, le=1, description="Choose among the likeliest values."),
        class_label: Optional[int] = Input(default=None, ge=0, description="Number of a learned class."),
        true_cfg_scale: Optional[float] = Input(default=None, ge=1, le=50, description="FLUX dev: a second guidance."),
        scheduler: Optional[str] = Input(default=None, choices=SCHEDULERS, description="How the steps are taken."),
        seed: Optional[int] = Input(default=None, ge=0, description="The same seed draws the same picture."),
        lora_scale: float = Input(default=1.0, ge=-4, le=4, description="Strength of the trained weights."),
        token_scale: Optional[float] = Input(default=None, ge=0, le=2, description="Strength of the trained tokens."),
        references: Optional[Path] = Input(default=None, description="Picture to edit, or to draw from (OmniGen2)."),
        image: Optional[Path] = Input(default=None, description="Picture to start from (img2img)."),
        mask: Optional[Path] = Input(default=None, description="As large as image: white is drawn anew (inpainting)."),
        prompt_strength: float = Input(default=0.8, ge=0, le=1, description="With an image: 1 draws over all of it."),
        condition: Optional[Path] = Input(default=None, description="Picture to draw from (weights of that method)."),
        second_condition: Optional[Path] = Input(default=None, description="Where the weights want two of them."),
        condition_ready: bool = Input(default=False, description="It is edges, greys, ... already."),
        condition_strength: float = Input(default=1.0, ge=0, le=10, description="Weight of it; 0 hides it."),
        keep_known: bool = Input(default=True, description="Task fill: pixels outside of the mask stay as they are."),
    ) -> List[Path]:
        """Draw; settings that are not given take the base model's values."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        with hosted.told_shortly():
            return cancel.run(lambda: self._drawn(inputs.pop("replicate_weights") or self.weights, inputs))

    def _drawn(self, weights: str | None, inputs: dict[str, Any]) -> List[Path]:
        """The pictures as files, which Cog sends."""
        shown = (inputs["condition"], inputs.pop("second_condition"))
        inputs["condition"] = tuple(path for path in shown if path is not None) or None
        inputs["references"] = None if inputs["references"] is None else (inputs["references"],)
        inputs["more_weights"] = tuple((inputs["more_weights"] or "").split()) or None
        places = {"weights": weights, "output_dir": self._fresh_folder()}
        settings = commandline.check(PredictSettings, inputs | places)
        seed, files = self.studio.draw(settings)
        print(f"seed: {seed}", flush=True)  # the file names tell it too, and hosts rename files
        return [Path(file) for file in files]

    def _fresh_folder(self) -> str:
        """A folder for one request. Cog leaves what it has sent, so those of long ago are removed here."""
        for old in LocalPath(self.pictures.name).iterdir():
            if time.time() - old.stat().st_mtime > SENT_BY_NOW:
                shutil.rmtree(old)
        return tempfile.mkdtemp(dir=self.pictures.name)


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    description = "Draw with trained weights, or with a base model alone."
    parser = commandline.build_parser(CommandSettings, "predict.py", description)
    settings = commandline.read(parser, CommandSettings, argv)
    if settings.prompt_file is None:
        seed, files = Studio().draw(settings)
    else:
        prompts = settings.prompts()
        seed, files = Studio().draw_each(prompts, settings.model_copy(update={"prompt": prompts[0]}))
    print(f"seed: {seed}", *files, sep="\n")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
