"""Captioners, by name: pictures -> one line of text each, for the pictures that the user did not caption.

The trigger word is not their business, nor is tidying up: see `preprocessing.rules`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from preprocessing.captioners import blip, florence2, qwen_vl
from preprocessing.captioners.base import Captioner, Lines, OnProgress
from preprocessing.captioners.lavis_client import LavisCaptioner, LavisSource
from preprocessing.errors import UserError
from preprocessing.models import loaded
from preprocessing.settings import PrepareSettings

if TYPE_CHECKING:
    from PIL import Image

ALTERNATIVES = "set captioner to none, or caption the pictures yourself"


class NoCaptioner:
    """Says nothing, which leaves the trigger word alone as the caption."""

    def caption(self, pictures: Sequence[Image.Image], on_progress: OnProgress) -> Lines:
        lines: Lines = [""] * len(pictures)
        on_progress(lines)
        return lines


def loaded_captioner(settings: PrepareSettings) -> AbstractContextManager[Captioner]:
    """The captioner that the settings name, its memory given back at the end.

    Raises UserError where its model or environment is not at hand.
    """
    if settings.captioner == "none":
        return nullcontext(NoCaptioner())
    if settings.captioner == "lavis":
        return closing(LavisCaptioner(_lavis_source(settings)))
    return loaded(lambda: _in_process(settings), f"captioner: {model_name(settings)}", ALTERNATIVES)


def _lavis_source(settings: PrepareSettings) -> LavisSource:
    return LavisSource() if settings.captioner_model is None else LavisSource(model=settings.captioner_model)


def _blip_source(settings: PrepareSettings) -> blip.BlipSource:
    source = blip.TOYBOX if settings.captioner == "toybox" else blip.LARGE
    return source if settings.captioner_model is None else replace(source, model=settings.captioner_model)


def subject_of(settings: PrepareSettings) -> str:
    """What the captioner calls a subject that it has no word for; "" where there is no one word."""
    return _blip_source(settings).subject if settings.captioner in ("blip", "toybox") else ""


def model_name(settings: PrepareSettings) -> str:
    """The Hub id or folder of the model that the captioner loads; "" where there is none."""
    own = {
        "blip": blip.LARGE.model,
        "toybox": blip.TOYBOX.model,
        "florence2": florence2.MODEL,
        "qwen-vl": qwen_vl.MODEL,
        "lavis": LavisSource().model,
        "none": "",
    }
    return settings.captioner_model or own[settings.captioner]


def _in_process(settings: PrepareSettings) -> Captioner:
    model = model_name(settings)
    if settings.captioner == "toybox" and not Path(model).is_dir():
        raise UserError(
            f"captioner: the toybox captioner is missing from {model}: "
            "restore that folder, or set captioner to none or blip."
        )
    if settings.captioner == "florence2":
        return florence2.Florence2Captioner(model)
    if settings.captioner == "qwen-vl":
        return qwen_vl.QwenVlCaptioner(qwen_vl.instruction(settings), model)
    return blip.BlipCaptioner(_blip_source(settings))


def identity(settings: PrepareSettings) -> str:
    """What changes whenever the captioner may write something else."""
    parts = [settings.captioner, model_name(settings), version("transformers")]
    if settings.captioner == "qwen-vl":
        parts.append(qwen_vl.instruction(settings))
    weights = Path(model_name(settings) or "none") / "model.safetensors"
    if weights.is_file():
        # A folder inside the checkout is the same model wherever the checkout lies.
        parts[1] = _hash(weights)
    return " ".join(parts)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
