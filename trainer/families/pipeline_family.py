"""What families have in common that are one stock diffusers pipeline: CLIP or T5 text encoders, a denoiser, a VAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.artifact import EMBEDDINGS, Manifest
from trainer.families import resolve
from trainer.families.base import DENOISER, TEXT, TEXT_TO_IMAGE, VAE, Family, Geometry, TextTower
from trainer.families.quiet import quietly
from trainer.samples import Conditioning, Picture, Sample

if TYPE_CHECKING:
    from trainer.model_card import Place


class PipelineFamily(Family):
    """A family around one pipeline, whose parts keep the names that they have in it."""

    usual: ClassVar[Geometry]  # of a single-file checkpoint, which says nothing of it
    denoiser: ClassVar[str]  # its name in the pipeline
    pipelines: ClassVar[dict[str, str]]  # task -> class in diffusers
    pipeline_options: ClassVar[dict[str, Any]] = {}  # what their constructors take beside the parts
    towers: ClassVar[tuple[tuple[str, str, str], ...]]  # tokenizer, encoder, embedding key
    pooled: ClassVar[str | None] = None  # the text encoder whose pooled text is read

    def __init__(self, pipe: Any, dtype: torch.dtype):
        self._pipe = pipe
        self.dtype = dtype
        self.device = torch.device("cpu")
        for module in self._modules():
            module.requires_grad_(False).eval()
        for tower in self.text:
            find_end_by_id(tower)
            drop_nothing(tower)

    @classmethod
    def _parts(cls) -> dict[str, tuple[str, ...]]:
        """Part -> names in the pipeline."""
        return {DENOISER: (cls.denoiser,), TEXT: tuple(n for tower in cls.towers for n in tower[:2]), VAE: ("vae",)}

    @classmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype) -> Family:
        path = Path(resolve(source))
        left_out = {name: None for part, names in cls._parts().items() if part not in parts for name in names}
        try:
            with quietly():
                if path.is_file():
                    pipe = cls._from_file(path, dtype, left_out)
                else:
                    pipe = cls._from_folder(str(path), dtype, left_out)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"base_model {path} could not be read ({str(error).splitlines()[0]}): download or copy it again."
            ) from error
        return cls(pipe, dtype)

    @classmethod
    def _from_file(cls, path: Path, dtype: torch.dtype, left_out: dict[str, None]) -> Any:
        """The pipeline of a single-file checkpoint."""
        pipeline_class = getattr(diffusers, cls.pipelines[TEXT_TO_IMAGE])
        return pipeline_class.from_single_file(str(path), torch_dtype=dtype, **left_out)

    @classmethod
    def _from_folder(cls, source: str, dtype: torch.dtype, given: dict[str, Any]) -> Any:
        """The pipeline of a folder or Hub id, with some of its parts `given` (None: left out)."""
        # the VAE in fp32: fp16 overflows in XL's decoder, and bf16 costs visible detail
        dtypes = {"vae": torch.float32, "default": dtype}
        pipeline_class = getattr(diffusers, cls.pipelines[TEXT_TO_IMAGE])
        return pipeline_class.from_pretrained(source, dtype=dtypes, **given, **cls._unused())

    @classmethod
    def _unused(cls) -> dict[str, None]:
        return {"feature_extractor": None, "image_encoder": None}

    def _modules(self) -> list[nn.Module]:
        return [part for part in self._pipe.components.values() if isinstance(part, nn.Module)]

    def module(self, name: str) -> nn.Module:
        return getattr(self._pipe, name)

    def to(self, device: torch.device) -> Family:
        for module in self._modules():
            module.to(device)
        self.device = device
        return self

    def free(self, part: str) -> None:
        from diffusers.training_utils import free_memory

        for name in self._parts()[part]:
            if name in self._pipe.components:
                setattr(self._pipe, name, None)
        free_memory()

    @property
    def text(self) -> list[TextTower]:
        towers = [(getattr(self._pipe, a), getattr(self._pipe, b), b, c) for a, b, c in self.towers]
        return [TextTower(*tower) for tower in towers if tower[1] is not None]

    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        (name,) = (tower[0] for tower in self.towers if tower[1] == encoder_name)
        setattr(self._pipe, name, tokenizer)

    @torch.no_grad()
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        vae = self._pipe.vae
        pixels = torch.stack([picture.pixels for picture in pictures]).to(self.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        samples = []
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            mean, std = (posterior.mean[i].float() - shift) * scale, posterior.std[i].float() * scale
            mask = None if picture.mask is None else nn.functional.adaptive_avg_pool2d(picture.mask, mean.shape[-2:])
            samples.append(Sample(mean.cpu(), std.cpu(), caption, mask, self._picture_conditioning(picture)))
        return samples

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> the means of their latents as the denoiser sees them, [B, C, h, w]."""
        vae = self._pipe.vae
        mean = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mean.float()
        return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _picture_conditioning(self, picture: Picture) -> Conditioning:
        """Conditioning that comes from the picture's geometry."""
        return {}

    def _tokens(self, tower: TextTower, captions: list[str]) -> Tensor:
        return tower.tokenizer(
            # a merged model's trigger, which stands for several tokens
            self._pipe.maybe_convert_prompt(captions, tower.tokenizer),
            padding="max_length",
            max_length=tower.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        pipeline_class = getattr(diffusers, self.pipelines[task])
        known = pipeline_class._get_signature_keys(pipeline_class)[0]
        if self._pipe.vae is not None:
            with quietly():
                # it is handed the denoiser's dtype; pipelines whose VAE overflows in fp16 cast it themselves
                self._pipe.vae.to(self.dtype)
        parts = {name: part for name, part in self._pipe.components.items() if name in known}
        pipe = pipeline_class(**parts, **self.pipeline_options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @classmethod
    def _tokens_for(cls, manifest: Manifest, place: Place) -> list[str]:
        if not manifest.tokens:
            return []
        code = [f"rows = load_file({place.path(EMBEDDINGS)})", f"tokens = {list(manifest.tokens)}".replace("'", '"')]
        for tokenizer, encoder, key in cls.towers:
            code.append(
                f'pipe.load_textual_inversion(list(rows["{key}"]), token=tokens, '
                f"text_encoder=pipe.{encoder}, tokenizer=pipe.{tokenizer})"
            )
            if encoder == cls.pooled:  # its configuration says 2, which makes transformers pool at the largest id
                code.append(f"{cls._pooling(encoder)}.eos_token_id = pipe.{tokenizer}.eos_token_id")
        return code

    @classmethod
    def _pooling(cls, encoder: str) -> str:
        """In Python for others, the module of a text encoder that pools."""
        return f"pipe.{encoder}.text_model"


def drop_nothing(tower: TextTower) -> None:
    """Read a text in training, where gradient checkpointing needs the training mode, as in drawing.

    The encoder is frozen; T5's own configuration leaves out one number in ten.
    """
    for module in tower.encoder.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def find_end_by_id(tower: TextTower) -> None:
    """Pool the text at its end token.

    CLIP configs of old say eos_token_id = 2 and pool at the largest id, which a new token would take from the end.
    """
    for module in tower.encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tower.tokenizer.eos_token_id
