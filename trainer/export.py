"""The door to other programs: weights in their formats, merged into the base model, of a lower rank, or extracted.

    python -m trainer.export --weights outputs/x/trained_model.tar --out exported
    python -m trainer.export --weights lora.safetensors --base_model toybox --out smaller --rank 8
    python -m trainer.export --weights outputs/x/trained_model.tar --out merged --merge true
    python -m trainer.export --weights outputs/full/trained_model.tar --out lora --extract true --rank 16

--weights takes what `predict.py` takes, of any format that it reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from preprocessing.errors import UserError
from trainer import commandline

if TYPE_CHECKING:
    from trainer.families.base import Family
    from trainer.ranks import Cut
    from trainer.weights import Weights

Format = Literal["all", "kohya", "diffusers", "peft", "archive"]


class ExportSettings(BaseModel):
    """What is read, what becomes of it, and how it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: str | None = Field(None, description="A trained_model.tar, its folder, a LoRA file, a URL or a Hub id.")
    out: Path = Field(description="Folder for what is written; it must be empty or not be there.")
    base_model: str | None = Field(None, description="Null: the one that the weights were trained on.")
    format: Format = Field(
        "all", description="kohya (ComfyUI, A1111), diffusers, peft, our archive, or all of them; not with merge."
    )
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Precision of what is written.")
    rank: int | None = Field(None, ge=1, le=4096, description="Largest rank of a layer; lower ones stay as they are.")
    keep: float | None = Field(
        None, gt=0, le=1, description="Each layer gets the rank that holds this share of its squared norm."
    )
    merge: bool = Field(False, description="Write the base model with the weights in it, a diffusers folder.")
    single_file: bool = Field(False, description="With merge: a checkpoint in one file too, for A1111 and ComfyUI.")
    extract: bool = Field(False, description="Make a LoRA of weights of method full, or of tuned_model; rank says how.")
    tuned_model: str | None = Field(None, description="With extract: a fine-tuned model, in place of weights.")
    trigger_word: str = Field("TOK", pattern=r"^\S+$", description="With tuned_model: the word that calls the subject.")

    @model_validator(mode="after")
    def _fits_together(self) -> ExportSettings:
        if (self.weights is None) == (self.tuned_model is None):
            raise ValueError("give either weights or tuned_model")
        if self.tuned_model is not None and not (self.extract and self.base_model):
            raise ValueError("tuned_model goes with extract true and the base_model that it came from")
        if self.merge and (self.extract or self.rank or self.keep or self.format != "all"):
            raise ValueError("merge writes a whole model: leave extract, rank, keep and format out")
        if self.single_file and not self.merge:
            raise ValueError("single_file goes with merge true")
        if self.extract and not (self.rank or self.keep):
            raise ValueError("extract needs a rank, or the share to keep")
        return self


def export(settings: ExportSettings) -> list[str]:
    """Do what the settings say; what was written and what it lost, in sentences. UserError where it cannot be done."""
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise UserError(f"out {settings.out} is not empty: choose another folder.")
    if settings.tuned_model is not None:
        from trainer.families.base import DENOISER, TEXT

        family = _loaded(settings.base_model, frozenset({DENOISER, TEXT}))
        weights, told = _extracted_from_model(settings, family)
        return told + _write_formats(settings, family, weights)
    with _opened(settings) as (folder, base_model, family):
        if settings.merge:
            from trainer.merge import save_merged

            return save_merged(folder, family, (base_model, settings.dtype), settings.out, settings.single_file)
        from trainer.weights import Weights

        weights, told = Weights.read(folder), []
        if settings.extract:
            weights, told = _extracted_from_archive(settings, family, weights)
        elif weights.manifest.method == "full":
            raise UserError(
                "weights of method full are whole nets, which these formats cannot hold: give --merge true, or "
                "--extract true and a rank."
            )
        elif settings.rank or settings.keep:
            weights, told = _resized(settings, weights)
        return told + _write_formats(settings, family, weights)


@contextmanager
def _opened(settings: ExportSettings) -> Iterator[tuple[Path, str, Family]]:
    """The weights' folder in our layout, the base model's name, and the base model loaded, in fp32 on the CPU."""
    from trainer import artifact, foreign
    from trainer.families.base import DENOISER, TEXT, VAE
    from trainer.weights_cache import WeightsCache

    with WeightsCache.from_environment().held(settings.weights) as held, foreign.unpacked(held.path) as unpacked:
        base_model = settings.base_model or foreign.base_of(unpacked)
        if base_model is None:
            raise UserError("the weights do not tell what they were trained on: give base_model.")
        parts = frozenset({DENOISER, TEXT, VAE} if settings.merge else {DENOISER, TEXT})
        family = _loaded(base_model, parts, foreign.companion_of(unpacked))
        with foreign.opened(unpacked, family, base_model) as folder:
            manifest = artifact.read_manifest(folder)
            if manifest.family not in family.serves:
                raise UserError(f"the weights are for a {manifest.family} and {base_model} is a {family.name}.")
            yield folder, base_model, family


def _loaded(base_model: str, parts: frozenset[str], companion: str | None = None) -> Family:
    import torch

    from trainer import families

    return families.load(base_model, parts, torch.float32, companion)


def _cut(settings: ExportSettings) -> Cut:
    from trainer.ranks import Cut

    return Cut(settings.rank, settings.keep)


def _resized(settings: ExportSettings, weights: Weights) -> tuple[Weights, list[str]]:
    from trainer import artifact
    from trainer.ranks import resized

    if not weights.tensors:
        raise UserError("the weights hold no LoRA whose rank could be changed: leave rank and keep out.")
    if (kind := artifact.adapter_type(weights.manifest.nets)) != "lora":
        raise UserError(f"the weights are of adapter_type {kind}, not LoRA, whose rank can be changed: leave rank out.")
    weights, kept = resized(weights, _cut(settings))
    dora = any(config.get("use_dora") for config in weights.manifest.nets.values())
    return weights, [kept.told() + (" (of DoRA's direction; its magnitudes stay)" if dora else "")]


def _extracted_from_archive(settings: ExportSettings, family: Family, weights: Weights) -> tuple[Weights, list[str]]:
    if weights.manifest.method != "full":
        raise UserError("extract is for weights of method full, and these are an adapter already: leave it out.")
    states: dict[str, dict] = {}
    for key, value in weights.tensors.items():
        net, _, name = key.partition(".")
        states.setdefault(net, {})[name] = value
    settings_of = weights.manifest.settings | {"method": "lora"}
    manifest = weights.manifest.model_copy(update={"method": "lora", "settings": settings_of})
    from trainer.weights import Weights

    return _extracted(settings, family, states, Weights(manifest))


def _extracted_from_model(settings: ExportSettings, family: Family) -> tuple[Weights, list[str]]:
    from trainer.config import JobSettings
    from trainer.families.base import DENOISER, TEXT
    from trainer.weights import Weights, manifest_for

    tuned = _loaded(settings.tuned_model, frozenset({DENOISER, TEXT}))
    if tuned.name != family.name:
        raise UserError(f"tuned_model is a {tuned.name} and base_model a {family.name}: give two of one kind.")
    states = {net.name: dict(tuned.module(net.name).named_parameters()) for net in tuned.nets}
    job = JobSettings(
        input_images=Path("elsewhere"),
        base_model=settings.base_model,
        method="lora",
        trigger_word=settings.trigger_word,
        train_text_encoder=True,
    )
    return _extracted(settings, family, states, Weights(manifest_for(family, settings.base_model, job, {})))


def _extracted(
    settings: ExportSettings, family: Family, states: dict[str, dict], weights: Weights
) -> tuple[Weights, list[str]]:
    from trainer.ranks import extracted

    nets = {net.name: family.module(net.name) for net in family.nets if net.name in states}
    for name, module in nets.items():
        for key, base in module.named_parameters():
            if key in states[name] and states[name][key].shape != base.shape:
                raise UserError(
                    f"{name}.{key} has another shape in the base model: give the base that it was tuned from."
                )
    found = extracted(nets, states.get, _cut(settings), weights)
    if not found.weights.tensors:
        raise UserError("the two models do not differ in any layer that LoRA can hold: there is nothing to extract.")
    return found.weights, found.told()


def _write_formats(settings: ExportSettings, family: Family, weights: Weights) -> list[str]:
    from trainer import formats
    from trainer.devices import DTYPES
    from trainer.methods import METHODS

    if not (weights.tensors or weights.rows) or not METHODS[weights.manifest.method].in_stock_pipelines:
        raise UserError(
            f"weights of method {weights.manifest.method} have no form in other programs: predict.py draws with them, "
            "and init_adapter trains on from them."
        )
    dtype = DTYPES[{"fp32": "no"}.get(settings.dtype, settings.dtype)]
    chosen = formats.WRITERS if settings.format == "all" else {settings.format: formats.WRITERS[settings.format]}
    settings.out.mkdir(parents=True, exist_ok=True)
    weights, written = weights.cast(dtype), []
    for write in chosen.values():
        written += write(settings.out, family, weights)
    if not written:
        raise UserError(f"{settings.format} has no place for these weights: give another --format; archive holds all.")
    return [f"written: {path}" for path in written]


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    parser = commandline.build_parser(ExportSettings, "trainer.export", "Weights for other programs.")
    print(*export(commandline.read(parser, ExportSettings, argv)), sep="\n")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
