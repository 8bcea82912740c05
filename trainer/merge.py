"""A base model with weights merged into it: a stock diffusers folder that draws what the two draw together."""

from __future__ import annotations

import shutil
from pathlib import Path

from preprocessing.errors import UserError
from trainer import artifact, families, methods
from trainer.devices import DTYPES
from trainer.families.base import Family
from trainer.generate import settings_of

SINGLE_FILE = "model.safetensors"


def save_merged(folder: Path, family: Family, base: tuple[str, str], out: Path, single_file: bool = False) -> list[str]:
    """Merge an opened archive into `family` (all parts loaded, in fp32) and write it to `out`; what to know, told.

    `base` is the base model's name and the precision to write (fp32, fp16, bf16); the VAE is written in fp32, since
    some overflow in fp16. New tokens lie in tokenizer and text encoder, under the trigger word itself.
    """
    base_model, precision = base
    manifest = artifact.read_manifest(folder)
    method = methods.create(settings_of(manifest))
    method.load(folder, family)
    if single_file and manifest.tokens:
        raise UserError(
            "single_file has no place for new tokens, which such a file keeps no tokenizer for: leave it out, or use "
            "the LoRA and embedding files."
        )
    word = method.merge(family)
    dtype = DTYPES[{"fp32": "no"}.get(precision, precision)]
    for net in family.nets:
        family.module(net.name).to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    if single_file:
        family.save_single_file(out / SINGLE_FILE)
    model = out / "model" if single_file else out
    family.save_pipeline(model)
    own = Path(families.resolve(base_model)) / families.RECOMMENDED
    if own.is_file():  # what our programs draw and train with
        shutil.copyfile(own, model / own.name)
    told = [f"written: {model}"] + ([f"written: {out / SINGLE_FILE}"] if single_file else [])
    return [*told, f'the prompt\'s word is "{word}": pipe("a photo of {word}")']
