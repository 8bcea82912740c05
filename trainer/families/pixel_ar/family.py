"""The autoregressive family: pictures as values, not latents; the loss is their negative log-likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families import model_config, resolve
from trainer.families.base import DENOISER, TEXT_TO_IMAGE, Family, Geometry, Net, TextTower
from trainer.families.pixel_ar import begin
from trainer.families.pixel_ar.model import bits_per_dim
from trainer.families.pixel_ar.pipeline import PixelARPipeline, open_pipeline
from trainer.families.pixel_ar.sampling import Sampling
from trainer.objectives import masked_mean
from trainer.samples import Batch, Conditioning, Picture, Sample

STRIDE = 8  # of the buckets; the model itself takes any size


class PixelAutoregressive(Family):
    """One net, whose text encoder is a part of it and always trained with it: the cache holds token ids."""

    name: ClassVar[str] = "pixel_ar"
    own_settings: ClassVar[tuple[str, ...]] = begin.ARCHITECTURE
    draw_options: ClassVar[tuple[str, ...]] = ("temperature", "top_p", "class_label")
    card_program: ClassVar[str | None] = None
    ui_files: ClassVar[bool] = False
    card_tags: ClassVar[tuple[str, ...]] = ("autoregressive",)
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": {
            "max_train_steps": 100_000,
            "train_batch_size": 32,
            "learning_rate": 3e-4,
            "preservation_weight": 0.0,
            "save_diffusers": True,
        },
        "draw": {"guidance_scale": 1.0, "num_inference_steps": 1},
    }

    def __init__(self, pipe: PixelARPipeline, source: Path, dtype: torch.dtype):
        self._pipe, self._source, self.dtype, self.device = pipe, source, dtype, torch.device("cpu")
        self.nets = (Net("model", DENOISER, {}),)
        pipe.model.requires_grad_(False).eval()

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        return Geometry(stride=STRIDE, resolution=model_config(source, "model")["image_size"])

    @classmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype) -> PixelAutoregressive:
        path = Path(resolve(source))
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            path = Path(snapshot_download(source))
        return cls(open_pipeline(path, dtype), path, dtype)

    @classmethod
    def check(cls, settings: JobSettings) -> None:
        super().check(settings)
        if settings.method != "full":
            raise UserError(f"method {settings.method} adapts diffusion models: train pixel_ar with method full.")
        if settings.train_text_encoder:
            raise UserError("train_text_encoder: pixel_ar's text encoder is always trained: leave it out.")
        for name in ("noise_offset", "enable_xformers"):
            if getattr(settings, name):
                raise UserError(f"{name} is for diffusion models: leave it out.")

    @classmethod
    def begin(cls, settings: JobSettings, dataset: PreparedDataset, folder: Path) -> JobSettings:
        return begin.begin(settings, dataset, folder)

    @classmethod
    def figures(cls, loss: float) -> dict[str, float]:
        return {"bits_per_dim": bits_per_dim(loss)}

    def module(self, name: str) -> nn.Module:
        return self._pipe.model

    def to(self, device: torch.device) -> PixelAutoregressive:
        self._pipe.model.to(device)
        self.device = device
        return self

    def free(self, part: str) -> None:
        """Nothing: tokenizer and text encoder are needed to the end."""

    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        """Samples of uint8 values [channels, H, W], without spread."""
        levels, channels = self._pipe.model.config.levels, self._pipe.model.config.channels
        nothing, samples = torch.zeros(1, 1, 1), []
        for picture, caption in zip(pictures, captions, strict=True):
            pixels = picture.pixels if channels == 3 else picture.pixels.mean(dim=0, keepdim=True)
            values = ((pixels + 1) * ((levels - 1) / 2)).round().to(torch.uint8)
            samples.append(Sample(values, nothing, caption, picture.mask, self._class(picture.class_label)))
        return samples

    def _class(self, label: int | None) -> Conditioning:
        """The conditioning of a picture's class, without a batch dimension; that of none is the last one's."""
        classes = self._pipe.model.config.num_classes
        return {"class_label": torch.tensor(classes if label is None else label)} if classes else {}

    def null_picture(self) -> Conditioning:
        return self._class(None)

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Token ids [B, L]: the net reads them itself."""
        return self._pipe.encode(captions)

    @property
    def text(self) -> list[TextTower]:
        """None that a method could train through: the net's own is trained with it."""
        return []

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        raise UserError("pixel_ar takes no new tokens: train it with method full.")

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Log-probabilities [B, channels, H, W, levels] of the values `noisy`; there is no time."""
        logits = self._pipe.model(noisy, conditioning["ids"], conditioning.get("class_label"))
        return logits.float().log_softmax(dim=-1)

    def probe(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        return self.predict(batch.data, batch.uniform, conditioning)

    def sample_losses(self, batch: Batch, conditioning: Conditioning, snr_gamma: float | None) -> Tensor:
        """Nats a value, the mean over the picture, or over its mask: [B]."""
        nats = self._pipe.model.nats(batch.data, conditioning["ids"], conditioning.get("class_label"))
        return masked_mean(nats, batch.mask)

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        if task != TEXT_TO_IMAGE:
            raise UserError("pixel_ar draws from words alone: leave image and mask out.")
        return Called(self._pipe)

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"text": (conditioning, negative)}

    def save_pipeline(self, folder: Path) -> None:
        self._pipe.register_to_config(made_from="")  # what is trained is a base model of its own
        self._pipe.save_pretrained(folder)

    def save_base(self, folder: Path) -> None:
        begin.write(folder, self._pipe, with_weights=False)
        begin.copy_defaults(self._source, folder)

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        raise UserError("ComfyUI and A1111 draw with diffusion models: pixel_ar is nothing for them.")


class Called:
    """The pipeline with a picture's settings as all families are given them."""

    def __init__(self, pipe: PixelARPipeline):
        self.stock = pipe

    @property
    def scheduler(self) -> Any:
        raise UserError("scheduler: pixel_ar takes no steps in time: leave it out.")

    def __call__(self, text: Any, generator: list[torch.Generator], width: int, height: int, **drawing: Any) -> Any:
        sampling = Sampling(drawing["temperature"], drawing["top_p"], drawing["guidance_scale"])
        return self.stock(
            text=text,
            generator=generator,
            class_label=drawing["class_label"],
            size=(width, height),
            sampling=sampling,
        )
