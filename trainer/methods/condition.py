"""Conditioning on pictures: LoRA that acts on the condition's tokens alone (OminiControl, see trainer.branches)."""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer import artifact
from trainer.artifact import Manifest
from trainer.branches import HOLE, Layout, Placement
from trainer.condition_tasks import Task, blackened, task
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Drawable, Family
from trainer.methods import adapters
from trainer.methods.base import Method, ParameterGroup, Shown, scheduled
from trainer.methods.lora import UP, WEIGHTS, lora_groups, weights_group
from trainer.samples import Batch, Conditioning, Picture

SOURCE = "source"  # beside condition_0, condition_1, ... in a sample's conditioning
SETTINGS = "condition_settings"  # in the adapter's header
TOLD = (
    "condition_tasks",
    "resolution",
    "condition_resolution",
    "position_scale",
    "position_delta",
    "independent_condition",
    "token_integration",
)
ADDED = re.compile(rf"condition_\d+|{HOLE}|{SOURCE}")


class Condition(Method):
    """Learns to draw what condition pictures show; one adapter serves all conditions."""

    name: ClassVar[str] = "condition"
    changes_weights: ClassVar[bool] = False  # text and picture stay on the base weights
    draws_from_conditions: ClassVar[bool] = True

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self.tasks: list[Task] = [task(name) for name in settings.condition_tasks]
        self._family: Drawable | None = None
        self._start: Path | None = None
        self._nothing: dict[torch.Size, Tensor] = {}  # latents of black pictures, by shape
        if settings.token_integration and [type(one).__name__ for one in self.tasks] != ["Fill"]:
            raise UserError("token_integration is for condition_tasks fill alone: switch it off.")

    @property
    def needs_vae(self) -> bool:
        """Whether conditions differ from step to step, and are encoded in training."""
        return any(one.random for one in self.tasks)

    def begin_from(self, folder: Path) -> None:
        self._start = folder

    def attach(self, family: Family) -> list[ParameterGroup]:
        settings, (net,) = self.settings, [net for net in family.nets if net.part == DENOISER]
        targets, unread = family.condition_layers()
        self._family = family
        pattern = settings.target_modules or targets
        module = family.module(net.name)
        check_pattern(pattern, module)
        if self._start is not None:
            config = adapters.saved_configs(self._start, family)[net.name]
            tensors, _ = artifact.load_tensors(self._start / artifact.ADAPTER)
            given = {key.removeprefix(f"{net.name}.").partition(".lora_")[0] for key in tensors}
            if settings.target_modules and not all(re.fullmatch(pattern, name) for name in given):
                raise UserError("target_modules does not agree with init_adapter: leave it out.")
            parameters = adapters.put_in(module, net.name, config, tensors)
        else:
            parameters = self._injected(module, pattern, unread)
        family.add_branches(self.layout())
        return lora_groups(settings, [weights_group(settings, WEIGHTS, parameters)], [module])

    def _injected(self, module: nn.Module, pattern: str, unread: str) -> list[nn.Parameter]:
        """The parameters of a fresh adapter."""
        settings = self.settings
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,
            target_modules=pattern,
            exclude_modules=unread,
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return adapters.inject(module, config)

    def layout(self) -> Layout:
        """Where the conditions' tokens lie, and what they see."""
        settings = self.settings
        placements = []
        for one in self.tasks:
            delta = settings.position_delta or (None if one.apart else (0.0, 0.0))
            scale = settings.position_scale or (1.0 if one.apart else 1 / self._share(one))
            placements.append(Placement(delta, scale))
        return Layout(tuple(placements), settings.independent_condition, settings.token_integration, self.adapter)

    def _share(self, one: Task) -> float:
        """The condition's side over the picture's."""
        settings = self.settings
        if settings.condition_resolution is None:
            return one.reduced
        return settings.condition_resolution / settings.resolution

    def schedule(self, progress: float) -> dict[str, float]:
        return dict.fromkeys((WEIGHTS, WEIGHTS + UP), scheduled(self.settings, progress))

    def picture(self, picture: Picture) -> Picture:
        if all(type(one).target is Task.target for one in self.tasks):
            return picture
        return replace(picture, pixels=_tensor(self.tasks[0].target(_image(picture.pixels))))

    def sample_conditioning(self, family: Family, picture: Picture) -> Conditioning:
        """What is cached of a picture: the conditions' latents or, where they are random, the picture itself."""
        family.condition_layers()  # raises where a family has no branches
        stored: Conditioning = {}
        source = _image(picture.pixels)
        for index, one in enumerate(self.tasks):
            if not one.random:
                made = self._condition(one, index, picture, source)
                stored[f"condition_{index}"] = self._latents(family, [self._sized(made, one, family)])[0].cpu()
        if self.needs_vae:
            stored[SOURCE] = torch.from_numpy(np.asarray(source).copy()).permute(2, 0, 1)
        return stored

    def _condition(self, one: Task, index: int, picture: Picture, source: Image.Image) -> Image.Image:
        if not one.paired:
            return one.condition(source, None)
        if index >= len(picture.conditions):
            raise UserError(
                f"condition {index} of a picture is missing: upload it beside x.png as "
                f"{'x.condition.png' if index == 0 else f'x.condition.{index}.png'}."
            )
        return one.condition(_image(picture.conditions[index]), None)

    def _sized(self, condition: Image.Image, one: Task, family: Drawable) -> Image.Image:
        """A condition of the picture's size as small as it is trained."""
        stride, share = family.pixels_per_token, self._share(one)
        size = tuple(max(stride, round(side * share / stride) * stride) for side in condition.size)
        return condition if size == condition.size else condition.resize(size, Image.Resampling.LANCZOS)

    def _latents(self, family: Drawable, conditions: list[Image.Image]) -> Tensor:
        """[B, C, h, w]; of black pictures too, for dropout."""
        latents = family.encode_pixels(torch.stack([_tensor(one) for one in conditions]))
        shape = latents.shape[1:]
        if shape not in self._nothing:
            black = -torch.ones_like(_tensor(conditions[0]))
            self._nothing[shape] = family.encode_pixels(black[None])[0]
        return latents

    @torch.no_grad()
    def prepared(self, family: Family, batch: Batch, dropout: bool = True) -> Batch:
        """The batch with this step's random conditions, some of them dropped."""
        given = {name: value for name, value in batch.conditioning.items() if name != SOURCE}
        mask = batch.mask
        randoms = [random.Random(key) for key in batch.keys]
        for index, one in enumerate(self.tasks):
            name = f"condition_{index}"
            if one.random:
                sources = [Image.fromarray(s.permute(1, 2, 0).cpu().numpy()) for s in batch.conditioning[SOURCE]]
                pairs = list(zip(sources, randoms, strict=True))
                holes = [self._hole(one, source.size, rng, family) for source, rng in pairs]
                made = [one.condition(source, rng) for source, rng in pairs]
                shown = [self._sized(blackened(p, hole), one, family) for p, hole in zip(made, holes, strict=True)]
                given[name] = self._latents(family, shown)
                if self.settings.token_integration:
                    given[HOLE] = torch.stack([family.token_mask(torch.from_numpy(hole)) for hole in holes])
                    given[HOLE] = given[HOLE].to(batch.data.device)
                    # the known tokens' velocity is told, not learned
                    mask = given[HOLE].repeat_interleave(2, 2).repeat_interleave(2, 3).float()
                    continue
            if dropout:
                given[name] = self._dropped(given[name], randoms)
        return replace(batch, conditioning=given, mask=mask)

    def _hole(self, one: Task, size: tuple[int, int], rng: random.Random, family: Family) -> np.ndarray | None:
        """A task's hole; with token integration one that leaves tokens to know and tokens to draw."""
        hole = one.hole(size, rng)
        while self.settings.token_integration:
            tokens = family.token_mask(torch.from_numpy(hole))
            if tokens.any() and not tokens.all():
                break
            hole = one.hole(size, rng)
        return hole

    def _dropped(self, latents: Tensor, randoms: list[random.Random]) -> Tensor:
        drop = torch.tensor([rng.random() < self.settings.image_dropout for rng in randoms], device=latents.device)
        nothing = self._nothing[latents.shape[1:]].to(latents)
        return torch.where(drop.view(-1, 1, 1, 1), nothing, latents)

    def prompted(self, batch: Batch) -> Batch:
        kept = {name: value for name, value in batch.conditioning.items() if not ADDED.fullmatch(name)}
        return replace(batch, conditioning=kept)

    def drawing_settings(self, dataset: PreparedDataset, picture: int, folder: Path, strength: float) -> dict[str, Any]:
        """From the conditions of one of the data set's pictures; of a task with holes the right half is drawn."""
        item = dataset.items[picture]
        uploaded = [dataset.folder / path for path in item.conditions]
        given: dict[str, Any] = {"condition_strength": strength}
        given["condition"] = tuple(
            uploaded[i] if one.paired and i < len(uploaded) else dataset.folder / item.image
            for i, one in enumerate(self.tasks)
        )
        if any(one.has_holes for one in self.tasks):
            given["mask"] = folder / "mask.png"
            right = Image.new("L", item.size, 0)
            right.paste(255, (item.size[0] // 2, 0, *item.size))
            right.save(given["mask"])
        return given

    @property
    def condition_count(self) -> int:
        return len(self.tasks)

    def drawing_conditioning(self, family: Drawable, shown: Shown) -> Conditioning:
        given: Conditioning = {}
        for index, (one, picture) in enumerate(zip(self.tasks, shown.pictures, strict=True)):
            made = picture if shown.ready or one.paired else one.condition(picture, None)
            filled = blackened(made, shown.hole if one.has_holes else None)
            given[f"condition_{index}"] = self._latents(family, [self._sized(filled, one, family)])
        if self.settings.token_integration:
            if shown.hole is None:
                raise UserError("mask is missing: these weights draw what is white in it and keep the rest.")
            given[HOLE] = family.token_mask(torch.from_numpy(shown.hole))[None].to(family.device)
        return given

    def finished(self, drawn: Image.Image, shown: Shown) -> Image.Image:
        """With a task that has holes, what lies outside of the hole is the condition's own, pixel by pixel."""
        known = [picture for one, picture in zip(self.tasks, shown.pictures, strict=True) if one.has_holes]
        if not known or shown.hole is None:
            return drawn
        return Image.composite(drawn, known[0], Image.fromarray(shown.hole))

    def nets(self) -> dict[str, dict[str, Any]]:
        return adapters.net_configs(self._family, self._net_names(self._family))

    def _net_names(self, family: Drawable) -> list[str]:
        return [net.name for net in family.nets if net.part == DENOISER]

    def save(self, folder: Path, manifest: Manifest) -> None:
        tensors = adapters.lora_state(self._family, self._net_names(self._family))
        settings = self.settings
        told = {
            "condition_tasks": " ".join(settings.condition_tasks),
            "position_delta": " ".join(map(str, settings.position_delta or ("auto",))),
            "position_scale": str(settings.position_scale or "auto"),
            "independent_condition": str(settings.independent_condition).lower(),
        }
        told[SETTINGS] = json.dumps({name: value for name, value in manifest.settings.items() if name in TOLD})
        artifact.save_tensors(folder / artifact.ADAPTER, tensors, artifact.adapter_header(tensors, manifest) | told)

    @classmethod
    def told_in(cls, header: Mapping[str, str]) -> dict[str, Any]:
        try:
            stored = json.loads(header.get(SETTINGS, "{}"))
            return {"method": cls.name} | {name: stored[name] for name in TOLD if name in stored}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError("The header of the weights is damaged: copy them again.") from error

    def load(self, folder: Path, family: Drawable) -> None:
        configs = adapters.saved_configs(folder, family)
        family.condition_layers()
        self._family = family
        adapters.load_lora(folder, family, configs, self.adapter)
        family.add_branches(self.layout())

    def detach(self, family: Drawable) -> None:
        if self._family is None:
            return
        family.remove_branches()
        for name in self._net_names(family):
            adapters.remove(family.module(name), self.adapter)
        self._family = None

    def set_strength(self, family: Drawable, strength: float) -> None:
        for name in self._net_names(family):
            for layer in adapters.tuner_layers(family.module(name)):
                layer.set_scale(self.adapter, strength)

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        """Text and picture are on the base weights anyway: without conditions it is the base model."""
        with family.unconditioned():
            yield


def check_pattern(pattern: str, net: nn.Module) -> None:
    """Raise UserError where a regular expression is none, or matches the whole name of no linear layer."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    try:
        if any(re.fullmatch(pattern, name) for name in names):
            return
    except re.error as error:
        raise UserError(f"target_modules is no regular expression ({error}): {pattern!r:.100}") from error
    plain = re.sub(r"\\d\+|\[0-9\]\+", "0", pattern).replace("\\", "").replace(".*", "")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names[:3]
    raise UserError(f"target_modules {pattern!r:.100} matches no layer: nearest are {', '.join(near)}.")


def _image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> RGB."""
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def _tensor(picture: Image.Image) -> Tensor:
    """RGB -> [3, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1
