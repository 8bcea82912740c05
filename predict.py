"""The door to drawing.

    python predict.py --weights outputs/x/trained_model.tar --prompt "a photo of TOK" --num_outputs 4
    python predict.py --prompt "a big red star"                       the base model alone

`Predictor` is the same for Cog. Cog reads the signature of `run` from the source without running it, so defaults,
bounds and choices are written out as literals; a test holds them equal to PredictSettings.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path as LocalPath
from typing import TYPE_CHECKING, Any, List, Optional

import requests
from cog import BaseRunner, Input, Path
from pydantic import Field

from preprocessing.errors import UserError
from trainer import commandline
from trainer.config import JobSettings
from trainer.drawing import DrawSettings

if TYPE_CHECKING:
    from PIL import Image

    from trainer.generate import Generator

DEFAULT_BASE = JobSettings.model_fields["base_model"].default
DOWNLOADS = LocalPath(tempfile.gettempdir()) / "atelier-weights"
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

SCHEDULERS = ["ddim", "ddpm", "euler", "euler_ancestral", "dpmsolver++", "unipc"]


class PredictSettings(DrawSettings):
    """Where the weights come from and the pictures go."""

    weights: str | None = Field(None, description="A trained_model.tar, its folder or URL; null: the base model alone.")
    base_model: str | None = Field(None, description="Null: the one that the weights were trained on.")
    output_dir: LocalPath = Field(LocalPath("outputs/predict"), description="Folder for the pictures.")


class Studio:
    """One Generator kept over many requests: base and weights are loaded only when they change."""

    def __init__(self) -> None:
        self.generator: Generator | None = None
        self.base_model: str | None = None
        self.loaded: tuple[LocalPath, int] | None = None  # the archive and its time stamp

    def ready(self, weights: str | None, base_model: str | None) -> "Generator":
        """A generator with `weights` (path or URL; None: none) on their own base, or on `base_model` if given."""
        archive = fetched(weights) if weights else None
        base = base_model or (trained_on(archive) if archive else DEFAULT_BASE)
        if self.generator is None or self.base_model != base:
            from trainer.generate import Generator

            self.generator = self.base_model = self.loaded = None  # free its memory before the next one is loaded
            self.generator, self.base_model = Generator(base), base
        wanted = (archive, archive.stat().st_mtime_ns) if archive else None
        if wanted != self.loaded:
            self.generator.release()
            self.loaded = None  # should `use` fail, it leaves the base model as it was
            if archive:
                self.generator.use(archive)
                self.loaded = wanted
        return self.generator

    def draw(self, settings: PredictSettings) -> tuple[int, list[LocalPath]]:
        """Draw and write the pictures; returns the first one's seed, and the files."""
        if settings.image and not settings.image.is_file():
            raise UserError(f"image {settings.image} does not exist: give the path of a picture")
        generator = self.ready(settings.weights, settings.base_model)
        from trainer.generate import seed_of

        settings = settings.model_copy(update={"seed": seed_of(settings)})
        what = DrawSettings(**settings.model_dump(include=set(DrawSettings.model_fields)))
        return settings.seed, written(generator.draw(what), settings)


def fetched(weights: str) -> LocalPath:
    """The local path of `weights`; an http(s) URL is downloaded once. Raises UserError where there is nothing."""
    if not weights.startswith(("http://", "https://")):
        path = LocalPath(weights)
        if not path.exists():
            raise UserError(f"weights {path} do not exist: give the path of a trained_model.tar")
        return path
    path = DOWNLOADS / f"{hashlib.sha256(weights.encode()).hexdigest()}.tar"
    if not path.exists():
        DOWNLOADS.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with requests.get(weights, stream=True, timeout=DOWNLOAD_TIMEOUT) as source, temporary.open("wb") as target:
                source.raise_for_status()
                for chunk in source.iter_content(2**20):
                    target.write(chunk)
            temporary.replace(path)
        except requests.RequestException as error:
            raise UserError(f"weights {weights} cannot be downloaded ({error}): check the URL") from error
        finally:
            temporary.unlink(missing_ok=True)
    return path


def trained_on(archive: LocalPath) -> str:
    """The base model that an archive of weights names."""
    from trainer import artifact

    with artifact.opened(archive) as folder:
        return artifact.read_manifest(folder).base_model


def written(pictures: "list[Image.Image]", settings: PredictSettings) -> list[LocalPath]:
    """Write each picture under the next free number, with the settings that drew it in its PNG text `atelier`.

    `settings.seed` must be set.
    """
    from PIL.PngImagePlugin import PngInfo

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    numbers = (path.name.partition("_")[0] for path in settings.output_dir.glob("*_seed*.png"))
    taken = [int(number) for number in numbers if number.isdecimal()]
    files = []
    for i, picture in enumerate(pictures):
        seed = settings.seed + i
        text = PngInfo()
        one = settings.model_copy(update={"seed": seed, "num_outputs": 1})
        text.add_itxt("atelier", one.model_dump_json(exclude_none=True))
        files.append(settings.output_dir / f"{max(taken, default=0) + i + 1:04d}_seed{seed}.png")
        picture.save(files[-1], pnginfo=text)
    return files


class Predictor(BaseRunner):
    """The same for Cog's server: the base model stays loaded between requests."""

    def setup(self, weights: Optional[str] = None) -> None:
        """Load the base model, and the weights that the container was given (COG_WEIGHTS), if any."""
        self.weights = weights
        self.studio = Studio()
        self.studio.ready(weights, None)

    def run(
        self,
        prompt: str = Input(description="What to draw; the trigger word calls the subject."),
        negative_prompt: str = Input(default="", description="What to keep away from."),
        replicate_weights: Optional[str] = Input(default=None, description="Path or URL of a trained_model.tar."),
        base_model: Optional[str] = Input(default=None, description="Normally the one the weights were trained on."),
        num_outputs: int = Input(default=1, ge=1, le=64, description="Pictures; each has the next seed."),
        width: Optional[int] = Input(default=None, ge=16, le=4096, description="In pixels."),
        height: Optional[int] = Input(default=None, ge=16, le=4096, description="In pixels."),
        guidance_scale: Optional[float] = Input(default=None, ge=0, le=50, description="Strictness about the prompt."),
        num_inference_steps: Optional[int] = Input(default=None, ge=1, le=1000, description="Denoising steps."),
        scheduler: Optional[str] = Input(default=None, choices=SCHEDULERS, description="How the steps are taken."),
        seed: Optional[int] = Input(default=None, ge=0, description="The same seed draws the same picture."),
        lora_scale: float = Input(default=1.0, ge=-4, le=4, description="Strength of the trained weights."),
        token_scale: Optional[float] = Input(default=None, ge=0, le=2, description="Strength of the trained tokens."),
        image: Optional[Path] = Input(default=None, description="Picture to start from (img2img)."),
        prompt_strength: float = Input(default=0.8, ge=0, le=1, description="With an image: 1 draws over all of it."),
    ) -> List[Path]:
        """Draw; settings that are not given take the base model's values."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        return self._drawn(inputs.pop("replicate_weights") or self.weights, inputs)

    def _drawn(self, weights: str | None, inputs: dict[str, Any]) -> List[Path]:
        """The pictures as files that Cog sends and then removes."""
        places = {"weights": weights, "output_dir": tempfile.mkdtemp(prefix="atelier-")}
        settings = commandline.check(PredictSettings, inputs | places)
        _, files = self.studio.draw(settings)
        return [Path(file) for file in files]


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    description = "Draw with trained weights, or with a base model alone."
    parser = commandline.build_parser(PredictSettings, "predict.py", description)
    seed, files = Studio().draw(commandline.read(parser, PredictSettings, argv))
    print(f"seed: {seed}", *files, sep="\n")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
