"""Drawing with the model as with a diffusers pipeline: called with words, it gives pictures; it saves and loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from preprocessing.errors import UserError
from trainer.families.pixel_ar.model import PixelAR
from trainer.families.pixel_ar.sampling import Sampling, draw
from trainer.families.pixel_ar.text import token_ids
from trainer.families.quiet import quietly


class PixelARPipeline(DiffusionPipeline):
    """The model and its tokenizer (None for a model that reads no text), with the seed of weights that are not there.

    A folder without weights is a model that is not trained yet: `untrained` makes them from `init_seed`.
    """

    _optional_components: ClassVar[list[str]] = ["tokenizer"]

    def __init__(self, model: PixelAR, tokenizer: Any | None, init_seed: int = 0, made_from: str = ""):
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        self.register_to_config(init_seed=init_seed, made_from=made_from)
        self.set_progress_bar_config(desc="rows", leave=False)

    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids [B, L] of the captions; L is 0 where no text is read."""
        if self.tokenizer is None:
            return {"ids": torch.zeros(len(captions), 0, dtype=torch.int32, device=self.model.device)}
        ids = token_ids(self.tokenizer, captions, self.model.config.max_text_length)
        return {"ids": ids.to(self.model.device)}

    def class_labels(self, class_label: int | None, count: int) -> dict[str, Tensor]:
        """A class for each of `count` pictures; None is no class. UserError for one that there is not."""
        classes = self.model.config.num_classes
        if not classes:
            if class_label is not None:
                raise UserError(f"class_label {class_label}: the model was trained without classes: leave it out.")
            return {}
        if class_label is not None and not 0 <= class_label < classes:
            raise UserError(f"class_label {class_label} is none of the model's classes: give 0 to {classes - 1}.")
        label = classes if class_label is None else class_label
        return {"class_label": torch.full((count,), label, device=self.model.device)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | None = None,
        text: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
        generator: list[torch.Generator] | None = None,
        class_label: int | None = None,
        size: tuple[int, int] | None = None,
        sampling: Sampling | None = None,
    ) -> Any:
        """Pictures of prompts, or of `text`: what `encode` gave of what is wanted and of what guidance leads away from.

        One generator a picture, which alone decides its chance. `size` is (width, height). The answer's `images` are
        PIL pictures.
        """
        sampling = sampling or Sampling()
        told, untold = text or (self.encode(prompt), self.encode([""] * len(prompt)))
        count = len(generator) if generator is not None else len(prompt)
        generator = generator or [torch.Generator() for _ in range(count)]
        told, untold = told | self.class_labels(class_label, count), untold | self.class_labels(None, count)
        if self.tokenizer is None and not self.model.config.num_classes:
            sampling = replace(sampling, guidance_scale=1.0)  # there is nothing to be led away from
        if sampling.guidance_scale != 1:
            told = {name: torch.cat([value, untold[name]]) for name, value in told.items()}
        condition = self.model.condition(told["ids"], told.get("class_label"))
        side = self.model.config.image_size
        width, height = size or (side, side)
        shape = (height, width, self.model.config.channels)
        uniform = torch.stack([torch.rand(shape, generator=one, device=one.device) for one in generator])
        with self.progress_bar(total=height) as bar:
            values = draw(self.model, condition, uniform.to(self.model.device), sampling, bar.update)
        return SimpleNamespace(images=[self._picture(one) for one in values.cpu()])

    def _picture(self, values: Tensor) -> Image.Image:
        """Values [channels, H, W] as an RGB picture."""
        scaled = values.double() * (255 / (self.model.config.levels - 1))
        return Image.fromarray(scaled.round().to(torch.uint8).permute(1, 2, 0).numpy()).convert("RGB")


def untrained(config: dict[str, Any], seed: int) -> PixelAR:
    """A model with fresh weights, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32)
        return PixelAR.from_config(config)


def has_weights(folder: Path) -> bool:
    """Whether the folder of a model holds weights, or only says how it is built."""
    return any((folder / "model").glob("*.safetensors"))


def open_pipeline(folder: Path, dtype: torch.dtype) -> PixelARPipeline:
    """The pipeline in a folder, on the CPU; UserError where it is damaged."""
    try:
        if has_weights(folder):
            with quietly():
                return PixelARPipeline.from_pretrained(folder, dtype=dtype)
        config = PixelAR.load_config(folder / "model")
        index = PixelARPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"base_model {folder} could not be read ({str(error).splitlines()[0]}): download or copy it again."
        ) from error
    seed = index["init_seed"]
    model = torch.nn.Module.to(untrained(config, seed), dtype)  # diffusers' own warns of layers that are not there
    return PixelARPipeline(model, open_tokenizer(folder), seed, index["made_from"])


def open_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a model's folder; None of one that reads no text."""
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    return AutoTokenizer.from_pretrained(path) if path.is_dir() else None
