"""The protocol of a base architecture, and what all diffusion families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer.artifact import Manifest
from trainer.branches import Layout
from trainer.objectives import Objective, masked_mean
from trainer.samples import Batch, Conditioning, Picture, Sample

DENOISER, TEXT, VAE = "denoiser", "text", "vae"
TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT = "text_to_image", "image_to_image", "inpaint"


# name in a picture's settings -> class in diffusers and the options that make it that scheduler
DDPM_SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# Not stored in 8 bits: adapters, and the small layers around the blocks that all of a prediction passes.
FULL_PRECISION = (r"lora_", r"embed", r"^conv_in", r"^conv_out", r"^proj_out", r"^norm_out")
FLOW_SCHEDULERS = {"euler": ("FlowMatchEulerDiscreteScheduler", {})}


@dataclass(frozen=True)
class Net:
    """A network that can be adapted; its name in the pipeline is also the prefix of its keys in the archive."""

    name: str
    part: str  # DENOISER or TEXT
    targets: dict[str, tuple[str, ...]]  # preset -> endings of module names


@dataclass(frozen=True)
class Geometry:
    """Pixels: the sides of a picture are multiples of `stride`; the model draws `resolution` squared by default."""

    stride: int
    resolution: int


@dataclass(frozen=True)
class TextTower:
    """One tokenizer with its encoder; `embedding_key` names its rows in embeddings.safetensors."""

    tokenizer: Any
    encoder: nn.Module
    name: str
    embedding_key: str


class Family(ABC):
    """A loaded base model. It lies on one device; its weights are frozen until a method attaches."""

    name: ClassVar[str]
    recommended: ClassVar[dict[str, dict[str, Any]]]  # settings by method, "any" for all
    drawing_dtype: ClassVar[torch.dtype] = torch.float16  # on accelerators
    schedulers: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = DDPM_SCHEDULERS
    objective: Objective
    nets: tuple[Net, ...]
    device: torch.device

    @classmethod
    @abstractmethod
    def geometry(cls, source: str) -> Geometry:
        """Read off the model's own configuration, before any weights."""

    @classmethod
    def recommended_for(cls, source: str) -> dict[str, dict[str, Any]]:
        """`recommended`, or what suits this one of the family's models."""
        return cls.recommended

    @classmethod
    @abstractmethod
    def load(cls, source: str, parts: frozenset[str], dtype: torch.dtype) -> Family:
        """Load the parts asked for (DENOISER, TEXT, VAE), frozen, on the CPU."""

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The live network called `name` in the pipeline."""

    @abstractmethod
    def to(self, device: torch.device) -> Family:
        """Move every part."""

    @abstractmethod
    def free(self, part: str) -> None:
        """Let one part leave memory; it cannot be used again."""

    @abstractmethod
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        """Latents and everything of the conditioning that is not text: the unit that is cached."""

    @abstractmethod
    def encode_text(self, captions: list[str]) -> Conditioning:
        """Text conditioning of B captions: tensors [B, ...]. Differentiable."""

    def null_conditioning(self) -> Conditioning:
        """The text conditioning that stands for no caption: tensors [1, ...]."""
        return self.encode_text([""])

    @property
    @abstractmethod
    def text(self) -> list[TextTower]:
        """The text encoders, for methods that train through them."""

    @abstractmethod
    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        """Give the text encoder of that name another tokenizer."""

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction in fp32, time and sign canonical (see trainer.objectives)."""

    @abstractmethod
    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        """The stock diffusers pipeline around this family's parts, for TEXT_TO_IMAGE, IMAGE_TO_IMAGE or INPAINT."""

    @abstractmethod
    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Tensor]:
        """The arguments by which the pipeline takes text that is already encoded."""

    def guidance_inputs(self, scale: float, negative_prompt: str) -> dict[str, float]:
        """The argument by which the pipeline takes the guidance scale. UserError for a negative prompt that the model
        has no use for.
        """
        return {"guidance_scale": scale}

    def condition_layers(self) -> tuple[str, str]:
        """Regular expressions of the layers (whole names in the denoiser) that a condition's LoRA goes into, and of
        those of them that nothing reads. UserError for a family that cannot be conditioned on pictures.
        """
        raise UserError(f"method condition is not for a {self.name}: choose a FLUX as base_model.")

    def store_in_fp8(self) -> None:
        """Keep the denoiser's linear and convolution weights in 8 bits, cast back layer by layer as they are used.
        For good: their lower bits are lost. After a method's `attach`, whose LoRA keeps its precision.
        """
        from diffusers.hooks import apply_layerwise_casting

        for net in (net for net in self.nets if net.part == DENOISER):
            module = self.module(net.name)
            kind = next(p.dtype for n, p in module.named_parameters() if ".lora_" not in n)
            apply_layerwise_casting(module, torch.float8_e4m3fn, kind, skip_modules_pattern=FULL_PRECISION)

    @property
    def pixels_per_token(self) -> int:
        """The side of a denoiser's token in pixels, where conditions are tokens."""
        raise NotImplementedError

    def token_mask(self, hole: Tensor) -> Tensor:
        """Pixels to draw, bool [H, W] -> the tokens that hold one of them, bool [1, h / 2, w / 2]."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> the means of their latents as the denoiser sees them, [B, C, h, w]."""
        raise NotImplementedError

    def add_branches(self, layout: Layout) -> None:
        """Let `predict` read condition_0, condition_1, ... (latents [B, C, h, w]) of its conditioning, and `hole` where
        the layout integrates tokens; the denoiser's LoRA acts on the conditions alone. See `condition_layers`.
        """
        raise NotImplementedError

    def remove_branches(self) -> None:
        """Take back what `add_branches` did; nothing where it did nothing."""
        return

    @contextmanager
    def conditioned(self, conditioning: Conditioning, strength: float) -> Iterator[None]:
        """Inside, the pipeline draws under conditions as in `add_branches`; their tokens weigh `strength` times."""
        yield

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in every net."""
        for net in self.nets:
            module = self.module(net.name)
            if module is not None:
                # transformers' name, then diffusers'
                enable = getattr(module, "activation_checkpointing_enable", None)
                (enable or module.enable_gradient_checkpointing)()

    @abstractmethod
    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Write LoRA weights (diffusers' keys) as a file that ComfyUI and A1111 load."""

    def own_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """LoRA of other programs with the layers of the model's first code taken for diffusers' modules."""
        return tensors

    def training_loss(self, batch: Batch, conditioning: Conditioning, snr_gamma: float | None) -> Tensor:
        """The weighted, masked denoising loss: mean over the batch, a scalar."""
        t = self.objective.times(batch.uniform)
        predicted = self.predict(self.objective.mix(batch.data, batch.noise, t), t, conditioning)
        error = (predicted - self.objective.target(batch.data, batch.noise, t)).square()
        return (masked_mean(error, batch.mask) * self.objective.weights(t, snr_gamma)).mean()
