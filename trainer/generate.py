"""Drawing with a base model and an archive of weights: what `predict.py`, the previews and the toybox's score share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from preprocessing.errors import UserError
from preprocessing.trigger import trigger_pattern
from trainer import artifact, families, methods
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.devices import drawing_dtype, pick_device
from trainer.drawing import DrawSettings
from trainer.families.base import DENOISER, TEXT, VAE, Family
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

    def use(self, archive: Path) -> None:
        """Put an archive's weights in, in place of any before. On an error the base model is left as it was.

        Raises UserError where the archive is not one, or was made on another base model.
        """
        with ExitStack() as stack:
            folder = stack.enter_context(artifact.opened(archive))
            manifest = artifact.read_manifest(folder)
            if manifest.family != self.family.name:
                raise UserError(
                    f"{archive} was trained on a {manifest.family} ({manifest.base_model}) and {self.base_model} is a "
                    f"{self.family.name}: choose its own base_model."
                )
            self.release()
            method = methods.create(_settings_of(manifest))
            stack.callback(self._forget, method)
            method.load(folder, self.family)
            self._method, self.manifest = method, manifest

    def _forget(self, method: Method) -> None:
        """Take out a method whose loading did not end well."""
        if self._method is not method:
            method.detach(self.family)

    def release(self) -> None:
        """Back to the base model, bit for bit."""
        if self._method is not None:
            self._method.detach(self.family)
        self._method = self.manifest = None

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
        pipe = self.family.pipeline(image_to_image=settings.image is not None)
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
            yield pipe(**text, **arguments, generator=noise).images

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
        return arguments | {"image": _open(settings.image, (width, height)), "strength": strength}

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
        pattern, class_word = trigger_pattern(self.manifest.trigger_word), self.manifest.class_word
        plain = self.family.encode_text([" ".join(pattern.sub(lambda _: class_word, p).split()) for p in prompts])
        return {name: torch.lerp(plain[name], value, scale) for name, value in encoded.items()}

    def _negative(self, count: int, settings: DrawSettings) -> Conditioning:
        if settings.negative_prompt:
            encoded = self.family.encode_text(self._words([settings.negative_prompt]))
        else:
            encoded = self.family.null_conditioning()
        return {name: value.expand(count, *value.shape[1:]) for name, value in encoded.items()}


PIPELINE_DEFAULTS = {"guidance_scale": 7.0, "num_inference_steps": 30}


def _settings_of(manifest: Manifest) -> JobSettings:
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


def _open(path: Path, size: tuple[int, int]) -> Image.Image:
    """A starting picture, cropped to `size`'s aspect ratio and resized to it."""
    try:
        with Image.open(path) as picture:
            return ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), size, Image.Resampling.LANCZOS)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read ({error}): give a PNG, JPEG or WebP picture.") from error
