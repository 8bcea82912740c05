"""Drawing with a base model and an archive of weights: what `predict.py`, the previews and the toybox's score share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from preprocessing.buckets import shown_size
from preprocessing.concepts import without_triggers
from preprocessing.errors import UserError
from trainer import artifact, families, foreign, methods
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.devices import drawing_dtype, pick_device
from trainer.drawing import FOR_SOME, DrawSettings
from trainer.families import quantised
from trainer.families.base import IMAGE_TO_IMAGE, INPAINT, TEXT_TO_IMAGE, Drawable
from trainer.methods import adapters
from trainer.methods.base import Method, Shown
from trainer.samples import Conditioning

DRAW_BATCH = 16


@dataclass(frozen=True)
class Opened:
    """An archive of weights, unpacked into `folder`."""

    archive: Path
    folder: Path
    manifest: Manifest


class Generator:
    """A base model that archives of weights are put into and taken out of.

    `companion` is where the other half of a model in two lies; None: the usual one. `precision` is that of the
    denoiser's weights, as base_precision, of which fp8 is one for training alone and makes no difference.
    """

    def __init__(
        self, base_model: str, device: str | None = None, companion: str | None = None, precision: str = "same"
    ):
        self.base_model, self.companion = base_model, companion
        self.device = pick_device(device)
        dtype = drawing_dtype(self.device, families.family_class(base_model).drawing_dtype)
        family, self.geometry = families.load_drawable(base_model, companion, dtype)
        if precision in quantised.MARKS:
            family.quantise(precision)
        self.family: Drawable = family.to(self.device)
        self.recommended = families.recommended(base_model, "draw")
        self.manifests: tuple[Manifest, ...] = ()
        self._methods: list[Method] = []
        self.archives: tuple[Path, ...] = ()  # where the weights in use came from

    def use(self, *archives: Path) -> None:
        """Put weights in (see `trainer.foreign` for which there are), in place of any before. Several are for several
        nets, or of conditions, each of which acts on its own pictures alone, in their order.

        Raises UserError where they are none, or were made on another base model. After any error, and after a cancel,
        which may come anywhere and is no Exception, everything is as it was before.
        """
        with ExitStack() as stack:
            opened = [self._opened(archive, stack) for archive in archives]
            _check_apart(opened)
            before = self.archives
            try:
                self.release()
                self._put_in(opened)
            except BaseException:
                self._put_back(before)
                raise

    def _opened(self, archive: Path, stack: ExitStack) -> Opened:
        folder = stack.enter_context(foreign.opened(archive, self.family, self.base_model))
        manifest = artifact.read_manifest(folder)
        if manifest.family not in self.family.serves:
            raise UserError(
                f"{archive} was trained on a {manifest.family} ({manifest.base_model}) and {self.base_model} is a "
                f"{self.family.name}: choose its own base_model."
            )
        return Opened(archive, folder, manifest)

    def _put_in(self, opened: list[Opened]) -> None:
        made = [methods.create(settings_of(one.manifest)) for one in opened]
        for one, method in sorted(zip(opened, made, strict=True), key=lambda pair: _turn(pair[1])):
            method.adapter = f"{adapters.ADAPTER}_{len(self._methods)}" if self._methods else adapters.ADAPTER
            self._methods.append(method)  # first, so that `release` takes out what is only half in
            method.load(one.folder, self.family)
        self._methods = made
        self.manifests = tuple(one.manifest for one in opened)
        self.archives = tuple(one.archive for one in opened)

    def _put_back(self, archives: tuple[Path, ...]) -> None:
        """Undo a change of weights that was stopped anywhere; without the files of the old ones, the base model."""
        self.release()
        try:
            with ExitStack() as stack:
                self._put_in([self._opened(archive, stack) for archive in archives])
        except BaseException as error:
            self.release()
            if not isinstance(error, UserError):  # that file has gone meanwhile; the error that led here is told
                raise

    def release(self) -> None:
        """Back to the base model, bit for bit. One that was stopped halfway is finished by the next."""
        for method in reversed(sorted(self._methods, key=_turn)):
            method.detach(self.family)
        self._methods, self.manifests, self.archives = [], (), ()

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
        for method, strength in zip(self._methods, self._strengths(settings), strict=True):
            method.set_strength(self.family, strength)
        references = self._references(settings) if settings.references else []
        size = self._size(settings, references)
        shown = self._shown(settings, size)
        started = settings.image is not None
        task = TEXT_TO_IMAGE if not started else IMAGE_TO_IMAGE if settings.mask is None else INPAINT
        pipe = self.family.pipeline(task)
        arguments = self._arguments(settings, size, "height" in signature(pipe.__call__).parameters)
        if references:
            arguments["references"] = references
        if settings.scheduler is not None:
            pipe.scheduler = _scheduler(settings.scheduler, pipe.scheduler.config, self.family)
        if settings.image is not None and settings.prompt_strength == 0:
            yield [arguments["image"]] * len(prompts)
            return
        for start in range(0, len(prompts), DRAW_BATCH):
            chunk = slice(start, start + DRAW_BATCH)
            text = self.family.pipeline_inputs(
                self._conditioning(prompts[chunk], settings), self._negative(len(prompts[chunk]), settings)
            )
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
            with self._conditioned(shown, settings):
                drawn = pipe(**text, **arguments, generator=noise).images
            for method, pictures in shown if settings.keep_known else ():
                drawn = [method.finished(one, pictures) for one in drawn]
            if task == INPAINT:  # the VAE alone changes every pixel a little
                drawn = [Image.composite(one, arguments["image"], arguments["mask_image"]) for one in drawn]
            yield drawn

    def _arguments(self, settings: DrawSettings, size: tuple[int, int], sized: bool) -> dict[str, Any]:
        """The pipeline's arguments that do not depend on the prompt, for a picture of `size`.

        `sized`: it takes width and height too, not from the picture to start from alone.
        """
        chosen = {
            "guidance_scale": settings.guidance_scale,
            "num_inference_steps": settings.num_inference_steps,
        }
        for name in FOR_SOME:
            if name in self.family.draw_options:
                chosen[name] = getattr(settings, name)
            elif getattr(settings, name) is not None:
                raise UserError(f"{name} is nothing that {self.base_model} has: leave it out.")
        arguments = {k: self.recommended.get(k, PIPELINE_DEFAULTS[k]) if v is None else v for k, v in chosen.items()}
        arguments |= self.family.guidance_inputs(
            arguments.pop("guidance_scale"), settings.negative_prompt, settings.true_cfg_scale
        )
        arguments |= self.family.reference_inputs(size, self._reference(settings, size))
        stride, (width, height) = self.geometry.stride, size
        for name, side in (("width", width), ("height", height)):
            if side % stride:
                raise UserError(
                    f"{name} {side} is not a multiple of {stride}: use {max(stride, side // stride * stride)}."
                )
        told = {"width": width, "height": height} if sized else {}
        if settings.image is None:
            return arguments | told
        # one step at least, and a little more, lest rounding make it none
        least = min(1.0, (1 + 1e-6) / arguments["num_inference_steps"])
        strength = max(settings.prompt_strength, least)
        pictures = _open_all(settings, size)
        return arguments | pictures | told | {"strength": strength}

    def _size(self, settings: DrawSettings, references: list[Image.Image]) -> tuple[int, int]:
        """Width and height: as wanted, or that of the one reference, which is edited, or the model's usual ones."""
        usual = self.geometry.resolution
        if len(references) == 1 and settings.width is None and settings.height is None:
            return references[0].size
        return settings.width or usual, settings.height or usual

    def _references(self, settings: DrawSettings) -> list[Image.Image]:
        """The reference pictures, none larger than the model draws. UserError where it takes none."""
        if "references" not in self.family.draw_options:
            raise UserError(f"references are nothing that {self.base_model} draws from: leave them out.")
        opened = [_open(path, "references").convert("RGB") for path in settings.references]
        sizes = [shown_size(one.size, self.geometry.resolution, self.geometry.stride) for one in opened]
        return [_fitted(one, size) for one, size in zip(opened, sizes, strict=True)]

    def _strengths(self, settings: DrawSettings) -> list[float]:
        """Of each archive: `more_scales` are the last ones'."""
        more = list(settings.more_scales or ())
        if more and len(more) >= len(self._methods):
            raise UserError(f"more_scales has {len(more)} numbers: give one for each of more_weights.")
        return [settings.lora_scale] * (len(self._methods) - len(more)) + more

    def _shown(self, settings: DrawSettings, size: tuple[int, int]) -> list[tuple[Method, Shown]]:
        """The condition pictures, of `size`, each with the method that draws from it."""
        wanting = [method for method in self._methods if method.draws_from_conditions]
        if self.family.takes_reference:  # no method draws from conditions there
            return []
        if not settings.condition:
            if wanting:
                raise UserError("condition is missing: these weights draw from condition pictures, give them.")
            return []
        if not wanting:
            raise UserError("condition: the weights in use draw from no condition picture; leave it out.")
        count = sum(method.condition_count for method in wanting)
        if len(settings.condition) != count:
            raise UserError(f"condition: these weights want {count} pictures, not {len(settings.condition)}.")
        pictures = iter([_fitted(_open(path, "condition").convert("RGB"), size) for path in settings.condition])
        hole = None
        if settings.mask is not None:
            hole = np.asarray(_fitted(_open(settings.mask, "mask").convert("L"), size)) >= 128
        return [
            (method, Shown(tuple(islice(pictures, method.condition_count)), settings.condition_ready, hole))
            for method in wanting
        ]

    def _reference(self, settings: DrawSettings, size: tuple[int, int]) -> Image.Image | None:
        """The picture that a model of references draws from, of the drawn one's `size`."""
        if not self.family.takes_reference or not settings.condition:
            return None
        if len(settings.condition) > 1:
            raise UserError(f"condition: {self.base_model} draws from one picture, not {len(settings.condition)}.")
        if settings.mask is not None:
            raise UserError(f"mask: {self.base_model} draws all of a picture anew: leave it out.")
        if settings.condition_ready or settings.condition_strength != 1:
            raise UserError("condition_ready and condition_strength are for weights of method condition: leave them.")
        return _fitted(_open(settings.condition[0], "condition").convert("RGB"), size)

    @contextmanager
    def _conditioned(self, shown: list[tuple[Method, Shown]], settings: DrawSettings) -> Iterator[None]:
        """Inside, the pipeline draws from the condition pictures."""
        if not shown:
            yield
            return
        given: Conditioning = {}
        first = 0
        for method, pictures in shown:
            for name, value in method.drawing_conditioning(self.family, pictures).items():
                kind, _, number = name.partition("_")
                given[f"{kind}_{int(number) + first}" if number else name] = value
            first += method.condition_count
        with self.family.conditioned(given, settings.condition_strength):
            yield

    def words(self, prompts: list[str]) -> list[str]:
        """Prompts as the text encoders read them with the weights in use."""
        for method in self._methods:
            prompts = method.words(prompts)
        return prompts

    def _conditioning(self, prompts: list[str], settings: DrawSettings) -> Conditioning:
        """Encoded prompts, moved between the class word's and the tokens' meaning by `token_scale`."""
        words = self.words(prompts)
        encoded = self.family.encode_text(words)
        scale = settings.token_scale
        if scale is None:
            scale = 0.5 + 0.5 * max(settings.lora_scale, 0.0) ** 0.4
        if scale == 1 or words == prompts:
            return encoded
        plain = self.family.encode_text([self._without_tokens(prompt) for prompt in prompts])
        return {name: torch.lerp(plain[name], value, scale) for name, value in encoded.items()}

    def _without_tokens(self, prompt: str) -> str:
        """The prompt with the class word in place of each trigger that stands for tokens."""
        for manifest in (one for one in self.manifests if one.tokens):
            prompt = without_triggers(prompt, {one.trigger_word: one.class_word for one in manifest.words})
        return prompt

    def _negative(self, count: int, settings: DrawSettings) -> Conditioning:
        with ExitStack() as stack:
            for method in self._methods:
                stack.enter_context(method.reading_negatives(self.family))
            if settings.negative_prompt:
                encoded = self.family.encode_text(self.words([settings.negative_prompt]))
            else:
                encoded = self.family.negative_conditioning()
        return {name: value.expand(count, *value.shape[1:]) for name, value in encoded.items()}


PIPELINE_DEFAULTS = {
    "guidance_scale": 7.0,
    "num_inference_steps": 30,
    "prior_guidance_scale": 4.0,
    "prior_num_inference_steps": 25,
    "image_guidance_scale": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "class_label": None,
}


def _turn(method: Method) -> int:
    """When a method is put in: conditions last, for what is in a net by then acts on the text and the picture."""
    return int(method.draws_from_conditions)


def _check_apart(opened: list[Opened]) -> None:
    """Raise UserError where two archives would change the same net, but for those of conditions, which act on these."""
    taken: dict[str, Path] = {}
    for one in opened if len(opened) > 1 else ():
        if methods.METHODS[one.manifest.method].draws_from_conditions:
            continue
        for net in artifact.nets_of(one.folder):
            if net in taken:
                raise UserError(f"{taken[net]} and {one.archive} both hold weights of the {net}: give one of them.")
            taken[net] = one.archive


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


def _scheduler(name: str, config: dict[str, Any], family: Drawable) -> Any:
    import diffusers

    if name not in family.schedulers:
        raise UserError(f"scheduler {name} is not for a {family.name}: use one of {', '.join(family.schedulers)}.")
    class_name, options = family.schedulers[name]
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
    fitted = {name: _fitted(one, size) for name, one in pictures.items()}
    if settings.mask is not None:  # as the pipeline takes it: drawn anew or not, nothing between
        fitted["mask_image"] = fitted["mask_image"].point(lambda value: 255 if value >= 128 else 0)
    return fitted


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cropped to the size's aspect ratio and resized to it."""
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _open(path: Path, name: str) -> Image.Image:
    """A picture, upright."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} {path} cannot be read ({error}): give a PNG, JPEG or WebP picture.") from error
