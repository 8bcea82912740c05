"""Drawing with a base model and an archive of weights: what `predict.py`, the previews and the toybox's score share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from preprocessing.errors import UserError
from preprocessing.trigger import without_trigger
from trainer import artifact, families, foreign, methods
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.devices import drawing_dtype, pick_device
from trainer.drawing import DrawSettings
from trainer.families.base import DENOISER, IMAGE_TO_IMAGE, INPAINT, TEXT, TEXT_TO_IMAGE, VAE, Family
from trainer.methods.base import Method
from trainer.samples import Conditioning

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DRAW_BATCH = 16


class Generator:
    """A base model that archives of weights are put into and taken out of."""

    def __init__(self, base_model: str, device: str | None = None):
        self.base_model = base_model
        self.device = pick_device(device)
        dtype = drawing_dtype(self.device)
        parts = frozenset({DENOISER, TEXT, VAE})
        family = families.family_class(base_model).load(base_model, parts, dtype)
        self.family: Family = family.to(self.device)
        self.recommended = families.recommended(base_model, "draw")
        self.resolution = families.family_class(base_model).geometry(base_model).resolution
        self.manifest: Manifest | None = None
        self._method: Method | None = None
        self.archive: Path | None = None  # where the weights in use came from

    def use(self, archive: Path) -> None:
        """Put weights in (see `trainer.foreign` for which there are), in place of any before.

        Raises UserError where they are none, or were made on another base model. After any error, and after a cancel,
        which may come anywhere and is no Exception, everything is as it was before.
        """
        with foreign.opened(archive, self.family, self.base_model) as folder:
            manifest = artifact.read_manifest(folder)
            if manifest.family != self.family.name:
                raise UserError(
                    f"{archive} was trained on a {manifest.family} ({manifest.base_model}) and {self.base_model} is a "
                    f"{self.family.name}: choose its own base_model."
                )
            method, before = methods.create(settings_of(manifest)), self.archive
            try:
                self.release()
                self._put_in(method, folder, manifest)
                self.archive = archive
            except BaseException:
                self._put_back(before)
                raise

    def _put_in(self, method: Method, folder: Path, manifest: Manifest) -> None:
        self._method = method  # first, so that `release` takes out what is only half in
        method.load(folder, self.family)
        self.manifest = manifest

    def _put_back(self, archive: Path | None) -> None:
        """Undo a change of weights that was stopped anywhere; without the file of the old ones, the base model."""
        self.release()
        if archive is None:
            return
        try:
            with foreign.opened(archive, self.family, self.base_model) as folder:
                manifest = artifact.read_manifest(folder)
                self._put_in(methods.create(settings_of(manifest)), folder, manifest)
                self.archive = archive
        except BaseException as error:
            self.release()
            if not isinstance(error, UserError):  # that file has gone meanwhile; the error that led here is told
                raise

    def release(self) -> None:
        """Back to the base model, bit for bit. One that was stopped halfway is finished by the next."""
        if self._method is not None:
            self._method.detach(self.family)
        self._method = self.manifest = self.archive = None

    def draw(self, settings: DrawSettings) -> list[Image.Image]:
        """`num_outputs` pictures of one prompt, with the seeds seed, seed + 1, ...; see `seed_of`."""
        first = seed_of(settings)
        seeds = [first + i for i in range(settings.num_outputs)]
        return self.draw_prompts([settings.prompt] * settings.num_outputs, seeds, settings)

    def draw_prompts(self, prompts: list[str], seeds: list[int], settings: DrawSettings) -> list[Image.Image]:
        """One picture per prompt and seed. A picture depends on its own prompt and seed, not on its neighbours."""
        pictures: list[Image.Image] = []
        for part in self._drawn(prompts, seeds, settings):
            pictures += part
        return pictures

    @torch.no_grad()
    def _drawn(self, prompts: list[str], seeds: list[int], settings: DrawSettings) -> Iterator[list[Image.Image]]:
        if self._method is not None:
            self._method.set_strength(self.family, settings.lora_scale)
        arguments = self._arguments(settings)
        task = TEXT_TO_IMAGE if settings.image is None else IMAGE_TO_IMAGE if settings.mask is None else INPAINT
        pipe = self.family.pipeline(task)
        if settings.scheduler is not None:
            pipe.scheduler = _scheduler(settings.scheduler, pipe.scheduler.config)
        if settings.image is not None and settings.prompt_strength == 0:
            yield [arguments["image"]] * len(prompts)
            return
        for start in range(0, len(prompts), DRAW_BATCH):
            chunk = slice(start, start + DRAW_BATCH)
            text = self.family.pipeline_inputs(
                self._conditioning(prompts[chunk], settings), self._negative(len(prompts[chunk]), settings)
            )
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
            drawn = pipe(**text, **arguments, generator=noise).images
            if task == INPAINT:  # the VAE alone changes every pixel a little
                drawn = [Image.composite(one, arguments["image"], arguments["mask_image"]) for one in drawn]
            yield drawn

    def _arguments(self, settings: DrawSettings) -> dict[str, Any]:
        """The pipeline's arguments that do not depend on the prompt."""
        chosen = {
            "guidance_scale": settings.guidance_scale,
            "num_inference_steps": settings.num_inference_steps,
        }
        arguments = {k: self.recommended.get(k, PIPELINE_DEFAULTS[k]) if v is None else v for k, v in chosen.items()}
        stride = self.family.geometry(self.base_model).stride
        width, height = settings.width or self.resolution, settings.height or self.resolution
        for name, side in (("width", width), ("height", height)):
            if side % stride:
                raise UserError(
                    f"{name} {side} is not a multiple of {stride}: use {max(stride, side // stride * stride)}."
                )
        if settings.image is None:
            return arguments | {"width": width, "height": height}
        # one step at least, and a little more, lest rounding make it none
        least = min(1.0, (1 + 1e-6) / arguments["num_inference_steps"])
        strength = max(settings.prompt_strength, least)
        pictures = _open_all(settings, (width, height))
        size = {"width": width, "height": height} if settings.mask is not None else {}
        return arguments | pictures | size | {"strength": strength}

    def _words(self, prompts: list[str]) -> list[str]:
        return self._method.words(prompts) if self._method is not None else prompts

    def _conditioning(self, prompts: list[str], settings: DrawSettings) -> Conditioning:
        """Encoded prompts, moved between the class word's and the tokens' meaning by `token_scale`."""
        words = self._words(prompts)
        encoded = self.family.encode_text(words)
        scale = settings.token_scale
        if scale is None:
            scale = 0.5 + 0.5 * max(settings.lora_scale, 0.0) ** 0.4
        if scale == 1 or words == prompts or self.manifest is None:
            return encoded
        trigger, class_word = self.manifest.trigger_word, self.manifest.class_word
        plain = self.family.encode_text([without_trigger(prompt, trigger, class_word) for prompt in prompts])
        return {name: torch.lerp(plain[name], value, scale) for name, value in encoded.items()}

    def _negative(self, count: int, settings: DrawSettings) -> Conditioning:
        if settings.negative_prompt:
            encoded = self.family.encode_text(self._words([settings.negative_prompt]))
        else:
            encoded = self.family.null_conditioning()
        return {name: value.expand(count, *value.shape[1:]) for name, value in encoded.items()}


PIPELINE_DEFAULTS = {"guidance_scale": 7.0, "num_inference_steps": 30}


def settings_of(manifest: Manifest) -> JobSettings:
    try:
        return JobSettings.model_validate(manifest.settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{artifact.MANIFEST} of the weights: settings: {field}: {first['msg']}; use the version of the program "
            f"that wrote it."
        ) from error


def seed_of(settings: DrawSettings) -> int:
    """The first seed: the user's, 0 included, or a random one."""
    return secrets.randbelow(2**32) if settings.seed is None else settings.seed


def _scheduler(name: str, config: dict[str, Any]) -> Any:
    import diffusers

    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)


def _open_all(settings: DrawSettings, size: tuple[int, int]) -> dict[str, Image.Image]:
    """The picture to start from and its mask, cropped to `size`'s aspect ratio and resized to it."""
    pictures = {"image": _open(settings.image, "image").convert("RGB")}
    if settings.mask is not None:
        mask = _open(settings.mask, "mask")
        if mask.size != pictures["image"].size:
            told = [f"{one.width}x{one.height}" for one in (mask, pictures["image"])]
            raise UserError(f"mask {settings.mask} is {told[0]} and image is {told[1]}: give a mask of the same size.")
        pictures["mask_image"] = mask.convert("L")
    fitted = {name: ImageOps.fit(one, size, Image.Resampling.LANCZOS) for name, one in pictures.items()}
    if settings.mask is not None:  # as the pipeline takes it: drawn anew or not, nothing between
        fitted["mask_image"] = fitted["mask_image"].point(lambda value: 255 if value >= 128 else 0)
    return fitted


def _open(path: Path, name: str) -> Image.Image:
    """A picture, upright."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} {path} cannot be read ({error}): give a PNG, JPEG or WebP picture.") from error
