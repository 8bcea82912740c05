"""Masks by words: CLIPSeg (Lueddecke & Ecker 2022, arXiv:2112.10003) by transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from preprocessing.captioners.base import device
from preprocessing.crop import Place, Task, is_finished, opened, save
from preprocessing.models import loaded
from preprocessing.pictures import UnreadablePicture
from preprocessing.settings import PrepareSettings

MODEL = "CIDAS/clipseg-rd64-refined"
LIKELY = 0.3  # from this probability on a pixel is shown
GROWN = 5  # pixels of the model's map, odd: what it finds is rather too small than too large
FEATHER = 3  # pixels of the model's map
SEEN = 352  # pixels of the longer side: the model sees no more


class TextMasker:
    """Says for each pixel whether the words are about it, on the accelerator if there is one."""

    batch_size = 8

    def __init__(self, words: str, model: str = MODEL):
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

        self._device = device()
        self._images = AutoImageProcessor.from_pretrained(model, backend="pil")
        tokens = AutoTokenizer.from_pretrained(model)([words], return_tensors="pt", truncation=True)
        self._words = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
        self._model: Any = CLIPSegForImageSegmentation.from_pretrained(model, use_safetensors=True, dtype=torch.float32)
        self._model.to(self._device).eval()

    def masks(self, pictures: list[Image.Image]) -> list[Image.Image | None]:
        """A mask ("L", of its picture's size) for each RGB picture; None where nothing of the kind is seen."""
        import torch

        pixels = self._images(images=pictures, return_tensors="pt")["pixel_values"].to(self._device)
        words = {name: value.expand(len(pictures), -1) for name, value in self._words.items()}
        with torch.inference_mode():
            logits = self._model(pixel_values=pixels, **words).logits.reshape(len(pictures), *pixels.shape[-2:])
        likely = torch.sigmoid(logits).cpu().numpy()
        return [_mask(one, picture.size) for one, picture in zip(likely, pictures, strict=True)]


def _mask(likely: np.ndarray, size: tuple[int, int]) -> Image.Image | None:
    if likely.max() < LIKELY:
        return None
    shown = Image.fromarray(np.where(likely >= LIKELY, 255, 0).astype(np.uint8))
    soft = shown.filter(ImageFilter.MaxFilter(GROWN)).filter(ImageFilter.GaussianBlur(FEATHER))
    return soft.resize(size, Image.Resampling.BILINEAR)


def loaded_masker(settings: PrepareSettings) -> AbstractContextManager[TextMasker]:
    """The masker that the settings ask for, its memory given back at the end; UserError where there is no model."""
    model = settings.mask_model or MODEL
    remedy = "or set mask_from to face, alpha or none"
    return loaded(lambda: TextMasker(settings.mask_words, model), f"mask_model: {model}", remedy)


def with_text_masks(tasks: Iterable[Task], place: Place, settings: PrepareSettings) -> Iterator[Task]:
    """The tasks, those that need one with a mask by words of the whole picture, in order and a batch at a time.

    The model is loaded for the first picture whose work is not finished; the masks lie in `place.folder`/whole.
    """
    tasks, number = iter(tasks), itertools.count()
    first = None
    for task in tasks:
        if not _settled(task, place):
            first = task
            break
        yield task
    if first is None:
        return
    with loaded_masker(settings) as masker, ThreadPoolExecutor(masker.batch_size) as pool:
        rest = itertools.chain([first], tasks)
        while batch := list(itertools.islice(rest, masker.batch_size)):
            wanting = [task for task in batch if not _settled(task, place)]
            seen = {
                task.name: picture for task, picture in zip(wanting, pool.map(_seen, wanting), strict=True) if picture
            }
            masks = dict(zip(seen, masker.masks(list(seen.values())) if seen else [], strict=True))
            for task in batch:
                mask = masks.get(task.name)
                if mask is not None:
                    path = place.folder / "whole" / f"{next(number):06d}.png"
                    save(mask, path)
                    task = replace(task, found_mask=path)
                yield task


def _settled(task: Task, place: Place) -> bool:
    return task.mask is not None or is_finished(task, place)


def _seen(task: Task) -> Image.Image | None:
    """The whole picture, small; None where it cannot be read, which is told when it is cropped."""
    try:
        picture = opened(task)[0].rgb
    except UnreadablePicture:
        return None
    picture.thumbnail((SEEN, SEEN), Image.Resampling.BILINEAR)
    return picture
