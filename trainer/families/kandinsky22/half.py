"""What the prior and the decoder share: how their parts are loaded and held, and CLIP's view of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDPMScheduler
from diffusers.training_utils import free_memory
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import hub
from trainer.artifact import Manifest
from trainer.families import INDEX, NoCompanion, family_class, model_index, resolve
from trainer.families.base import DENOISER, TEXT, TEXT_TO_IMAGE, VAE, Family, quoted
from trainer.families.quiet import quietly
from trainer.model_card import Place
from trainer.objectives import Ddpm
from trainer.samples import Conditioning, Picture

ALL_PARTS = frozenset({DENOISER, TEXT, VAE})
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
HALF_PRECISION = "torch_dtype=torch.float16"  # in Python for others
IMAGE_ENCODER = ("image_encoder", "image_processor")
# of a pipeline's parts; a scheduler's is read from the model's index
CLASSES = {
    "prior": (diffusers, "PriorTransformer"),
    "unet": (diffusers, "UNet2DConditionModel"),
    "movq": (diffusers, "VQModel"),
    "image_encoder": (transformers, "CLIPVisionModelWithProjection"),
    "text_encoder": (transformers, "CLIPTextModelWithProjection"),
    "image_processor": (transformers, "CLIPImageProcessor"),
    "tokenizer": (transformers, "CLIPTokenizer"),
}
RECOMMENDED: dict[str, dict[str, Any]] = {
    "any": {
        "max_train_steps": 1000,
        "train_batch_size": 4,
        "lora_rank": 4,
        "lora_targets": "attention",
        "learning_rate": 1e-4,
        "text_embedding_lr": 1e-3,
        "preservation_weight": 0.0,
        "save_diffusers": True,
    },
    "full": {"learning_rate": 1e-5},
    "prefix": {"learning_rate": 1e-4},
    "draw": {
        "guidance_scale": 4.0,
        "num_inference_steps": 50,
        "prior_guidance_scale": 4.0,
        "prior_num_inference_steps": 25,
    },
}


class Half(Family):
    """The prior or the decoder."""

    recommended: ClassVar[dict[str, dict[str, Any]]] = RECOMMENDED
    pipeline_class: ClassVar[str]  # of this half alone
    ui_files: ClassVar[bool] = False
    card_tags: ClassVar[tuple[str, ...]] = ("kandinsky", "kandinsky-2-2")
    parts: ClassVar[dict[str, tuple[str, ...]]]  # DENOISER, TEXT, VAE -> names in the pipeline

    def __init__(self, parts: dict[str, Any], dtype: torch.dtype):
        self._parts = parts
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.objective = Ddpm(DDPMScheduler.from_config(parts["scheduler"].config))
        for module in self._modules():
            module.requires_grad_(False).eval()

    @classmethod
    def wanted(cls, parts: frozenset[str]) -> list[str]:
        """Names of the components that belong to `parts`; the scheduler always does."""
        return ["scheduler", *(name for part in parts for name in cls.parts[part])]

    def components(self) -> dict[str, Any]:
        """What the stock pipeline of this half is made of."""
        pipeline_class = getattr(diffusers, self.pipeline_class)
        names, _ = pipeline_class._get_signature_keys(pipeline_class)
        return {name: self._parts[name] for name in names}

    def _modules(self) -> list[nn.Module]:
        return [part for part in self._parts.values() if isinstance(part, nn.Module)]

    def module(self, name: str) -> nn.Module | None:
        return self._parts.get(name)

    def to(self, device: torch.device) -> Half:
        for module in self._modules():
            module.to(device)
        self.device = device
        return self

    def free(self, part: str) -> None:
        for name in self.parts[part]:
            self._parts.pop(name, None)
        free_memory()

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        raise NotImplementedError("one half draws nothing alone: see load_drawable")

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        raise NotImplementedError("one half draws nothing alone: see load_drawable")

    @torch.no_grad()
    def image_embeds(self, pictures: list[Picture]) -> Tensor:
        """CLIP's embeddings of prepared pictures, [B, D] in fp32."""
        images = [to_image(picture) for picture in pictures]
        pixels = self._parts["image_processor"](images, return_tensors="pt").pixel_values
        encoder = self._parts["image_encoder"]
        return encoder(pixels.to(self.device, encoder.dtype)).image_embeds.float()

    @torch.no_grad()
    def black_embeds(self) -> Tensor:
        """The embedding that stands for no picture: CLIP's of zeros, as the prior's pipeline has it; [1, D]."""
        encoder = self._parts["image_encoder"]
        side = encoder.config.image_size
        return encoder(torch.zeros(1, 3, side, side, device=self.device, dtype=encoder.dtype)).image_embeds

    def save_pipeline(self, folder: Path) -> None:
        """As `Family.save_pipeline`, of this half alone."""
        with quietly():
            getattr(diffusers, self.pipeline_class)(**self.components()).save_pretrained(folder)
        index = folder / INDEX
        # without torchvision transformers calls it otherwise, which programs with it do not know
        text = index.read_text(encoding="utf-8").replace("CLIPImageProcessorPil", "CLIPImageProcessor")
        index.write_text(text, encoding="utf-8")

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Nothing is written: neither ComfyUI nor A1111 has a loader for Kandinsky's adapters."""


def companion_for(manifest: Manifest, place: Place, published: str) -> str:
    """The other half as the reader of a model card can load it: `published` where the job's own lies elsewhere."""
    companion = manifest.settings["companion_model"]
    return companion if place.output_dir is not None or hub.is_repository(companion) else published


def drawing_code(prompt: str, pipe: str, *more: str) -> str:
    """Python that draws `prompt` with the stock pipelines: `pipe` makes one, `more` are lines that change it."""
    lines = [
        "import torch",
        "from diffusers import AutoPipelineForText2Image, DiffusionPipeline",
        "",
        f"pipe = {pipe}",
        *more,
        "pipe.enable_model_cpu_offload()",
        f'pipe(prompt={quoted(prompt)}).images[0].save("picture.png")',
    ]
    return "\n".join(lines)


def load_parts(source: str, names: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Components of the pipeline `source` by name, on the CPU; no other file of it is fetched. Raises UserError."""
    path = resolve(source)
    classes = CLASSES | {"scheduler": (diffusers, model_index(source).get("scheduler", (None, None))[1])}
    loaded = {}
    for name in names:
        library, class_name = classes[name]
        try:
            part_class = getattr(library, class_name)
            # transformers would take the checkpoint's type, diffusers fp32
            kind = {"torch_dtype": dtype} if name not in ("scheduler", "tokenizer", "image_processor") else {}
            with quietly():
                loaded[name] = part_class.from_pretrained(path, subfolder=name, **kind)
        except (OSError, SafetensorError, TypeError, AttributeError) as error:
            raise UserError(
                f"base_model {path}: its {name} could not be read ({str(error).splitlines()[0]}): download or copy it "
                "again."
            ) from error
    return loaded


def companion_class(companion: str, wanted: str) -> type[Family]:
    """The family of the other half; NoCompanion where it cannot be had, UserError where it is not a `wanted`."""
    try:
        family = family_class(companion)
    except UserError as error:
        raise _no_companion(companion, wanted, error) from error
    if family.name != wanted:
        raise UserError(f"companion_model {companion} is a {family.name}: name the folder or Hub id of a {wanted}.")
    return family


def load_companion(companion: tuple[str, str], names: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """As `load_parts`, of the other half: its source and the family that it must be. Raises NoCompanion too."""
    source, wanted = companion
    companion_class(source, wanted)
    try:
        return load_parts(source, names, dtype)
    except UserError as error:
        raise _no_companion(source, wanted, error) from error


def _no_companion(companion: str, wanted: str, error: UserError) -> NoCompanion:
    return NoCompanion(
        f"companion_model {companion} could not be had: name the folder or Hub id of a {wanted} ({error})"
    )


def to_image(picture: Picture) -> Image.Image:
    """A prepared picture as it lies in its file."""
    pixels = ((picture.pixels + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy().astype(np.uint8))
