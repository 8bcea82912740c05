"""The protocol of a way to adapt a base model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings, Optimiser, Schedule
from trainer.families.base import Drawable, Family, TextTower
from trainer.samples import Batch, Conditioning, Picture


@dataclass
class ParameterGroup:
    """Trainable fp32 parameters that share an optimiser of their own."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: Optimiser
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Shown:
    """What a picture is drawn from: RGB pictures of its size, which with `ready` are the conditions themselves, and the
    pixels to draw, bool [H, W].
    """

    pictures: tuple[Image.Image, ...]
    ready: bool = False
    hole: np.ndarray | None = None


class Method(ABC):
    """One way to adapt. `attach` changes the family, `detach` takes every change back, bit for bit."""

    name: ClassVar[str]
    needs_text_grad: bool = False  # whether the text conditioning changes while training
    trains_base_weights: ClassVar[bool] = False  # then the base model is loaded in fp32
    has_strength: bool = True  # whether `set_strength` takes other values than 1
    changes_weights: ClassVar[bool] = True  # whether prompts without the trigger are drawn otherwise than before
    changes_text: bool = False  # whether prompts without the trigger are encoded otherwise than before
    changes_null: bool = False  # whether no caption is, too
    in_stock_pipelines: ClassVar[bool] = True  # whether other programs have a place for such weights
    needs_vae: bool = False  # whether pictures are encoded while training
    # whether pictures are drawn from condition pictures: no stock pipeline and no other program draws with the adapter,
    # and what is drawn is meant to look like pictures of the data set
    draws_from_conditions: ClassVar[bool] = False
    adapter: str = "default"  # peft's name for what `load` puts in: of several methods in one net each has its own

    def __init__(self, settings: JobSettings):
        self.settings = settings

    @property
    def condition_count(self) -> int:
        """How many condition pictures it draws from."""
        return 0

    @abstractmethod
    def attach(self, family: Family) -> list[ParameterGroup]:
        """Put the trainable parameters in."""

    @abstractmethod
    def detach(self, family: Drawable) -> None:
        """Leave the family bit-identical to before `attach` or `load`."""

    def begin_from(self, folder: Path) -> None:
        """Have `attach` start from an opened archive's weights, which lies there until then. UserError where it cannot.

        The settings agree with the archive already (trainer.start).
        """
        raise UserError(f"method {self.name} cannot start from other weights: leave init_adapter out.")

    def schedule(self, progress: float) -> dict[str, float]:
        """Factor of each group's learning rate at `progress` in [0, 1) of the run; 0 freezes the group."""
        return {}

    def penalty(self) -> Tensor | float:
        """A term that is added to the loss."""
        return 0.0

    def figures(self) -> dict[str, float]:
        """What is told of the trainable parameters after each step, in metrics.jsonl and to the trackers."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What training changes beside the trainable parameters, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from such a state, attached. ValueError where the method keeps none."""
        raise ValueError(f"method {self.name} keeps no state: the checkpoint is another method's")

    def words(self, captions: list[str]) -> list[str]:
        """Captions as the text encoders should read them."""
        return captions

    @contextmanager
    def reading_negatives(self, family: Drawable) -> Iterator[None]:
        """Inside, what guidance leads away from is encoded: a negative prompt, or no caption."""
        yield

    def reserved(self, tower: TextTower) -> int:
        """How many of the tokens that a text encoder reads are not the caption's."""
        return 0

    def picture(self, picture: Picture) -> Picture:
        """A prepared picture as it is to be drawn."""
        return picture

    def sample_conditioning(self, family: Family, picture: Picture) -> Conditioning:
        """What the method adds to a sample's conditioning, without a batch dimension. Called before `attach`."""
        return {}

    def prepared(self, family: Family, batch: Batch, dropout: bool = True) -> Batch:
        """A batch with what the method draws anew for every step; without `dropout` nothing is left out by chance."""
        return batch

    def prompted(self, batch: Batch) -> Batch:
        """A prepared batch without what the method added to its conditioning: as a prompt alone is drawn."""
        return batch

    def drawing_settings(self, dataset: PreparedDataset, picture: int, folder: Path, strength: float) -> dict[str, Any]:
        """How the finished weights draw a sample at a strength, beside its prompt and size: values of DrawSettings.
        `picture` of the data set may be shown to them; `folder` takes files that they need.
        """
        return {"lora_scale": strength}

    def drawing_conditioning(self, family: Drawable, shown: Shown) -> Conditioning:
        """What condition pictures add to a drawn picture's conditioning: condition_0, condition_1, ... and what else
        the family's `conditioned` reads, [1, ...] each.
        """
        raise UserError(f"condition: weights trained by method {self.name} draw from no condition picture; leave it.")

    def finished(self, drawn: Image.Image, shown: Shown) -> Image.Image:
        """A drawn picture with what is known of it put back."""
        return drawn

    @abstractmethod
    def disabled(self, family: Family) -> AbstractContextManager[None]:
        """Inside, the family predicts as the base model does from the base model's text."""

    def nets(self) -> dict[str, dict[str, Any]]:
        """peft's configuration of every net that carries an adapter, for the manifest."""
        return {}

    def tokens(self) -> tuple[str, ...]:
        """The new tokens that the trigger word stands for."""
        return ()

    @abstractmethod
    def save(self, folder: Path, manifest: Manifest) -> None:
        """Write the adapted weights into the folder of an archive, beside its manifest."""

    def save_diffusers(self, folder: Path, manifest: Manifest) -> None:
        """Write the adapted weights as diffusers itself loads them from a folder."""
        self.save(folder, manifest)
        adapter = folder / artifact.ADAPTER
        if adapter.is_file():
            adapter.replace(folder / artifact.LORA_FILE)

    @classmethod
    def told_in(cls, header: Mapping[str, str]) -> dict[str, Any]:
        """Settings without which the adapter cannot be used, from the header of an adapter.safetensors on its own."""
        return {}

    @abstractmethod
    def load(self, folder: Path, family: Drawable) -> None:
        """Put an opened archive's weights into `family`, for drawing. `detach` takes them out."""

    def merge(self, family: Family) -> str:
        """Make the weights that `load` put in the family's own, for good: nothing is left to `detach`.

        Returns the words by which a stock pipeline around the family calls the trigger. UserError where it cannot be.
        """
        raise UserError(f"weights trained by method {self.name} cannot be merged into a base model.")

    def set_strength(self, family: Drawable, strength: float) -> None:
        """Scale the adapter's effect; 0 is the base model's denoiser. Raises UserError where there is no scale."""
        if strength != 1:
            raise UserError(f"lora_scale cannot change weights trained by method {self.name}: leave it at 1.")


def weights_factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """Factor of the weights' learning rate: `warmup` is the share of the run that is linear warm-up."""
    if progress < warmup:
        return (progress + 1e-9) / warmup
    done = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "exponential":  # rises sixfold to the full rate, so that fresh tokens settle before the weights move
        return 6.0 ** (done - 1)
    return 1.0


def scheduled(settings: JobSettings, progress: float) -> float:
    """`weights_factor` as the settings have it, over the whole run."""
    return weights_factor(settings.lr_schedule, progress, settings.lr_warmup_steps / settings.max_train_steps)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of a module by name, as fp32 copies on the CPU."""
    named = module.named_parameters()
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named if p.requires_grad}
