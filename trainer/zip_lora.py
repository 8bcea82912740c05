"""A subject's LoRA and a style's as one that draws the subject in the style (ZipLoRA, Shah et al. 2023, 2311.13600):

python -m trainer.zip_lora --weights subject.tar --style_weights style.tar --out both.tar
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from preprocessing.errors import UserError
from trainer import commandline

if TYPE_CHECKING:
    from trainer.families.base import Family
    from trainer.generate import Generator
    from trainer.zipping import Shown


class ZipSettings(BaseModel):
    """What is zipped, and how the shares are found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: Path = Field(description="The subject's trained_model.tar or its folder, of method pivotal or lora.")
    style_weights: Path = Field(description="The style's, of method lora, on the same base model.")
    out: Path = Field(description="The archive to write; the subject's trigger word and tokens are in it.")
    prompt: str = Field("{trigger}", description="What the subject's weights draw; {trigger}: their trigger word.")
    style_prompt: str = Field("{trigger}", description="What the style's weights draw; {trigger}: their trigger word.")
    pictures: int = Field(4, ge=1, le=64, description="How many each draws, to be kept by both together.")
    steps: int = Field(100, ge=0, description="Optimiser steps; 0 adds the two as they are.")
    learning_rate: float = Field(0.01, gt=0, description="Of the shares.")
    overlap_penalty: float = Field(0.01, ge=0, description="Weight of the cosine between the two shares of a layer.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the pictures and the training.")
    base_model: str | None = Field(None, description="Null: the one that the weights were trained on.")
    device: str | None = Field(None, description="Null: the first accelerator, else the CPU.")


def zip_weights(settings: ZipSettings) -> None:
    """Write the archive. UserError where the two do not fit each other or hold what cannot be zipped."""
    import tempfile

    import torch

    from trainer import artifact
    from trainer.generate import Generator
    from trainer.weights import Weights
    from trainer.zipping import Zipped, check, train

    if settings.out.is_dir():
        raise UserError(f"out {settings.out} is a folder: give the name of the archive to write.")
    with artifact.opened(settings.weights) as first, artifact.opened(settings.style_weights) as second:
        subject, style = Weights.read(first), Weights.read(second)
        check(subject, style)
        generator = Generator(settings.base_model or subject.manifest.base_model, settings.device)
        family = whole_family(generator)
        shown = [
            show(generator, folder, prompt, settings)
            for folder, prompt in ((first, settings.prompt), (second, settings.style_prompt))
        ]
        torch.manual_seed(settings.seed)
        zipped = Zipped(family, (subject, style))
        train(zipped, shown, settings)
        with tempfile.TemporaryDirectory(prefix="weights-") as name:
            zipped.weights().write(Path(name))
            artifact.write(Path(name), settings.out)


def whole_family(generator: Generator) -> Family:
    """The generator's base model as one that can be trained; UserError for one in two halves."""
    from trainer.families.base import Family

    if not isinstance(generator.family, Family):
        raise UserError(f"{generator.base_model} is one half of a model: zip_lora is for models that are whole.")
    return generator.family


def show(generator: Generator, folder: Path, prompt: str, settings: ZipSettings) -> Shown:
    """Pictures that an archive's weights draw of their prompt, as latents, with the prompt as they read it."""
    import torch

    from trainer.artifact import read_manifest
    from trainer.drawing import DrawSettings
    from trainer.zipping import Shown, as_picture

    generator.use(folder)
    family = whole_family(generator)
    text = prompt.replace("{trigger}", read_manifest(folder).trigger_word)
    seeds = [settings.seed + index for index in range(settings.pictures)]
    drawn = generator.draw_prompts([text] * len(seeds), seeds, DrawSettings(prompt=text))
    with torch.no_grad():
        samples = family.encode([as_picture(one) for one in drawn], [text] * len(seeds))
        conditioning = family.encode_text(generator.words([text]))
    generator.release()
    return Shown(samples, conditioning)


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    parser = commandline.build_parser(ZipSettings, "trainer.zip_lora", "A subject's and a style's LoRA as one.")
    settings = commandline.read(parser, ZipSettings, argv)
    zip_weights(settings)
    print(f"weights: {settings.out}")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
