"""Base architectures, found by what a model says of itself."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.errors import UserError

if TYPE_CHECKING:
    import torch

    from trainer.families.base import Drawable, Family, Geometry

TOYBOX = Path(__file__).resolve().parents[2] / "toybox"
TOYBOX_MODELS = {"toybox": TOYBOX / "sd"} | {f"toybox/{name}": TOYBOX / name for name in ("sd", "flux", "pixel_ar")}
UNTRAINED = {"pixel_ar": Path(__file__).parent / "pixel_ar" / "untrained"}  # configurations without weights
INDEX = "model_index.json"
RECOMMENDED = "training_defaults.json"

# pipeline class in model_index.json -> module and class that serve it
PIPELINES = {
    "StableDiffusionPipeline": ("trainer.families.stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("trainer.families.stable_diffusion", "StableDiffusionXL"),
    "FluxPipeline": ("trainer.families.flux", "Flux"),
    "OmniGen2Pipeline": ("trainer.families.omnigen2.family", "OmniGen2"),
    "FluxKontextPipeline": ("trainer.families.flux_kontext", "FluxKontext"),
    "KandinskyV22PriorPipeline": ("trainer.families.kandinsky22.prior", "Prior"),
    "KandinskyV22Pipeline": ("trainer.families.kandinsky22.decoder", "Decoder"),
    "PixelARPipeline": ("trainer.families.pixel_ar.family", "PixelAutoregressive"),
}


class NoCompanion(UserError):
    """The other half of a base model could not be had."""


def resolve(source: str) -> str:
    """The name of a toybox model, or of one that is not trained yet, -> its folder; anything else as it is."""
    return str((TOYBOX_MODELS | UNTRAINED).get(source, source))


def asked_for(source: str) -> str:
    """The name that a base model was asked for by: of one that a job built, what it was built from."""
    path = Path(resolve(source)) / INDEX
    return (json.loads(path.read_text(encoding="utf-8")).get("made_from") if path.is_file() else None) or source


def _hub_file(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    named = sorted(TOYBOX_MODELS | UNTRAINED)
    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"base_model {source!r} is neither a folder nor a file here nor could its {name} be fetched from the Hub "
            f"({type(error).__name__}): give a folder, a .safetensors file, a Hub id or one of {named}."
        ) from error


def model_config(source: str, part: str) -> dict[str, Any]:
    """The config.json of one part of a base model that is a folder or lies on the Hub."""
    folder = Path(resolve(source))
    path = folder / part / "config.json" if folder.is_dir() else _hub_file(source, f"{part}/config.json")
    if not path.is_file():
        raise UserError(
            f"base_model {folder} has no {part}/config.json: give the folder of a whole diffusers pipeline."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _pipeline_of_file(path: Path) -> str:
    """The pipeline class of a single-file checkpoint, read off the names of its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"base_model {path} is not a safetensors file: give a .safetensors checkpoint.") from error
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        return "StableDiffusionXLPipeline"
    if any(key.startswith("cond_stage_model.") for key in keys):
        return "StableDiffusionPipeline"
    if any(re.match(r"(?:model\.diffusion_model\.)?double_blocks\.0\.", key) for key in keys):
        return "FluxPipeline"
    raise UserError(f"base_model {path} holds no checkpoint that is known: give a diffusers folder.")


def model_index(source: str) -> dict[str, Any]:
    """The model_index.json of a base model that is a folder or lies on the Hub: its pipeline and the parts' classes."""
    path = Path(resolve(source))
    if path.is_dir() and not (path / INDEX).exists():
        raise UserError(f"base_model {path} has no {INDEX}: give the folder of a whole diffusers pipeline.")
    index = path / INDEX if path.is_dir() else _hub_file(source, INDEX)
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))
        if "_class_name" in stored:
            return dict(stored)
        raise ValueError("it names no pipeline")
    except (ValueError, TypeError) as error:
        raise UserError(f"base_model {path} has a damaged {INDEX}: download or copy it again.") from error


def pipeline_name(source: str) -> str:
    """The class name of a base model's own pipeline; raises UserError where there is none."""
    path = Path(resolve(source))
    return _pipeline_of_file(path) if path.is_file() else model_index(source)["_class_name"]


def family_class(source: str) -> type[Family]:
    """The family that serves a base model; raises UserError for an architecture that has none."""
    name = pipeline_name(source)
    if name not in PIPELINES:
        raise UserError(f"base_model {source} is a {name}, which is not supported: use one of {sorted(PIPELINES)}.")
    module, attribute = PIPELINES[name]
    return getattr(importlib.import_module(module), attribute)


def load(source: str, parts: frozenset[str], dtype: torch.dtype, companion: str | None = None) -> Family:
    """A base model for training; `companion` is where its other half lies, of a model that comes in two."""
    family = family_class(source)
    halves = {} if companion is None else {"companion": companion}
    return family.load(source, parts, dtype, **halves)


def load_drawable(source: str, companion: str | None, dtype: torch.dtype) -> tuple[Drawable, Geometry]:
    """A base model for drawing, and the geometry of its pictures; without `companion` the usual one is taken."""
    family = family_class(source)
    companion = companion or family.usual_companion(source)
    return family.load_drawable(source, companion, dtype), family.drawn_geometry(source, companion)


def recommended(source: str, method: str) -> dict[str, Any]:
    """Settings that suit a base model and method: its own training_defaults.json over the family's."""
    defaults = family_class(source).recommended_for(source)
    own = Path(resolve(source)) / RECOMMENDED
    layers = [defaults] + ([json.loads(own.read_text(encoding="utf-8"))] if own.exists() else [])
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer.get("any", {}) | layer.get(method, {})
    return merged


def suiting(source: str, method: str) -> dict[str, Any]:
    """What to fill every open setting with, of those that have a value at all: `recommended` over what suits most."""
    family = family_class(source)
    usual = {
        "optimizer": "adamw",
        "n_tokens": 3,
        "resolution": family.geometry(source).resolution,
        "companion_model": family.usual_companion(source),
    }
    return usual | recommended(source, method)


def fingerprint(source: str) -> str:
    """SHA-256 that tells base models apart: of a file or folder its configs, and each weights file's size, header and
    first MiB (whole checkpoints take minutes to read); of a Hub id its commit.
    """
    path = Path(resolve(source))
    if not path.exists():
        return hashlib.sha256(f"{source}@{_hub_file(source, INDEX).parent.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.suffix
            digest.update(f"{name} {file.stat().st_size}\n".encode() + stream.read(2**20))
    return digest.hexdigest()
