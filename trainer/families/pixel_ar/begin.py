"""The model that a job begins with: one that is there already, one built anew, or one that is given text to read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer.config import JobSettings
from trainer.families import RECOMMENDED, asked_for, model_config, resolve
from trainer.families.pixel_ar.model import PixelAR
from trainer.families.pixel_ar.pipeline import PixelARPipeline, has_weights, open_pipeline, open_tokenizer, untrained
from trainer.families.pixel_ar.text import pretrained_tokenizer, vocabulary_tokenizer

SHAPE = (
    "hidden_dim",
    "num_layers",
    "use_frequency_prior",
    "text_embed_dim",
    "num_text_layers",
    "text_nhead",
    "max_text_length",
)
ARCHITECTURE = (*SHAPE, "vocab_size", "tokenizer", "use_text", "use_class_labels")
# what of a trained model can still be chosen when it is given text or classes for the first time
OF_TEXT = frozenset({"text_embed_dim", "num_text_layers", "text_nhead", "max_text_length"})
MOST_WORDS = 50257


def begin(settings: JobSettings, dataset: PreparedDataset, folder: Path) -> JobSettings:
    """The settings with the base model that is trained from: the one they name, or one written into `folder`.

    A base model without weights (`pixel_ar`) is built as the settings say, with a vocabulary of the captions; one with
    weights that reads no text is given text if `use_text` asks for it, and begins as the model it was.
    """
    source = Path(resolve(settings.base_model))
    if not source.is_dir():
        return _unchanged(settings, model_config(settings.base_model, "model"))
    config, tokenizer = model_config(str(source), "model"), open_tokenizer(source)
    trained = has_weights(source)
    wanted = _wanted(settings, config, trained)
    reads = settings.use_text if settings.use_text is not None else tokenizer is not None or not trained
    if reads and tokenizer is None:
        tokenizer = _tokenizer(settings, dataset)
    if trained and not reads and tokenizer is not None:
        raise UserError(f"use_text is false and base_model {source} reads text: leave use_text out.")
    wanted["vocab_size"] = len(tokenizer) if reads else 0
    if settings.use_class_labels and not config["num_classes"]:
        wanted["num_classes"] = _classes(dataset)
    wanted["image_size"] = settings.resolution
    if trained and wanted["vocab_size"] == config["vocab_size"] and wanted["num_classes"] == config["num_classes"]:
        return settings
    made_from = asked_for(settings.base_model)
    model = _extended(source, wanted, settings.seed) if trained else untrained(wanted, settings.seed)
    write(folder, PixelARPipeline(model, tokenizer if reads else None, settings.seed, made_from), trained)
    copy_defaults(source, folder)
    return settings.model_copy(update={"base_model": str(folder)})


def _wanted(settings: JobSettings, config: dict[str, Any], trained: bool) -> dict[str, Any]:
    """The model's configuration with the settings' shape; UserError where trained weights have another."""
    wanted = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in SHAPE:
        chosen = getattr(settings, name)
        if chosen is None or chosen == wanted[name]:
            continue
        if trained and not (name in OF_TEXT and not config["vocab_size"] and not config["num_classes"]):
            raise UserError(f"{name} {chosen}: base_model {settings.base_model} has {wanted[name]}: leave it out.")
        wanted[name] = chosen
    if wanted["text_embed_dim"] % wanted["text_nhead"]:
        raise UserError(
            f"text_embed_dim {wanted['text_embed_dim']} is no multiple of text_nhead {wanted['text_nhead']}: change it."
        )
    return wanted


def _unchanged(settings: JobSettings, config: dict[str, Any]) -> JobSettings:
    """A model on the Hub is trained as it is."""
    _wanted(settings, config, trained=True)
    return settings


def _tokenizer(settings: JobSettings, dataset: PreparedDataset) -> Any:
    """The tokenizer that the settings name, or one of the captions' words."""
    if settings.tokenizer is not None:
        return pretrained_tokenizer(settings.tokenizer)
    captions = [item.caption for item in dataset.items if item.caption]
    if not captions:
        raise UserError("The pictures have no captions to learn words from: add captions, or set use_text to false.")
    return vocabulary_tokenizer(captions, settings.vocab_size or MOST_WORDS)


def _classes(dataset: PreparedDataset) -> int:
    labels = [item.class_label for item in dataset.items]
    if any(label is None for label in labels):
        raise UserError("use_class_labels: the data set has pictures without a class: leave it out, or name a source.")
    return max(labels) + 1


def _extended(source: Path, wanted: dict[str, Any], seed: int) -> PixelAR:
    """A trained model with more to read: what is new is added as zeros, so that it predicts what it did before."""
    model = untrained(wanted, seed)
    own = open_pipeline(source, torch.float32).model.state_dict()
    missing, unexpected = model.load_state_dict(own, strict=False)
    if unexpected:
        raise RuntimeError(f"{source} has weights that a larger model has not: {unexpected[:3]}")
    if model.classes is not None and model.text_encoder is not None:
        # the layers that take in one vector are trained already; what is new in it must be nothing at first
        new = model.classes.weight if "classes.weight" in missing else model.text_encoder.pool[-1].weight
        torch.nn.init.zeros_(new)
        if new is not model.classes.weight:
            torch.nn.init.zeros_(model.text_encoder.pool[-1].bias)
    return model


def copy_defaults(source: Path, folder: Path) -> None:
    """Let a model that is made of another keep the settings that suit it."""
    if (source / RECOMMENDED).is_file():
        shutil.copyfile(source / RECOMMENDED, folder / RECOMMENDED)


def write(folder: Path, pipe: PixelARPipeline, with_weights: bool) -> None:
    """Write a base model whole; without weights where they are made from the seed."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    pipe.save_pretrained(building)
    if not with_weights:
        for path in (building / "model").glob("*.safetensors"):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
