"""The protocol of a base architecture, and what all diffusion families share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer.artifact import ADAPTER, LORA_FILE, Manifest
from trainer.config import FOR_SOME, JobSettings
from trainer.families.conditionable import Conditionable
from trainer.objectives import Objective, masked_mean
from trainer.samples import Batch, Conditioning, Picture, Sample

if TYPE_CHECKING:
    from PIL import Image

    from trainer.model_card import Place

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
# Not stored in 8 or 4 bits: adapters, and the small layers around the blocks that all of a prediction passes.
FULL_PRECISION = (r"lora_", r"embed", r"^conv_in", r"^conv_out", r"^proj_out", r"^norm_out")
FLOW_SCHEDULERS = {"euler": ("FlowMatchEulerDiscreteScheduler", {})}


@dataclass(frozen=True)
class Net:
    """A network that can be adapted; its name in the pipeline is also the prefix of its keys in the archive."""

    name: str
    part: str  # DENOISER or TEXT
    targets: dict[str, tuple[str, ...]]  # preset -> endings of module names
    fixed: frozenset[str] = frozenset()  # parameters that are statistics of the data: no method trains them


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

    @property
    def begin(self) -> int:
        """How many tokens the tokenizer puts before every text: 1 for CLIP's, 0 for T5's and Qwen's."""
        ids = self.tokenizer("").input_ids
        return int(len(ids) > 0 and ids[0] == self.tokenizer.bos_token_id)

    @property
    def positions(self) -> int | None:
        """How many tokens the encoder reads at the most; None where its positions are relative (T5)."""
        return getattr(self.encoder.config, "max_position_embeddings", None)


def quoted(text: str) -> str:
    """A string as Python and JSON write it: a trigger word may hold quotation marks."""
    return json.dumps(text, ensure_ascii=False)


class Drawable(Conditionable, ABC):
    """What weights are put into and pictures are drawn with: a family, or two that share a pipeline."""

    name: ClassVar[str]
    drawing_dtype: ClassVar[torch.dtype] = torch.float16  # on accelerators
    schedulers: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = DDPM_SCHEDULERS
    nets: tuple[Net, ...]
    device: torch.device
    # settings of a picture beside those that all have (names in trainer.drawing.FOR_SOME); the pipeline takes them
    draw_options: ClassVar[tuple[str, ...]] = ()
    # whether each picture is drawn from another one: in training the data set's first condition of it
    takes_reference: ClassVar[bool] = False
    # ends of the names of the layers that make keys, and values, of the text ("context"), of a UNet that attends to it
    text_layers: ClassVar[tuple[str, str] | None] = None

    @property
    def serves(self) -> tuple[str, ...]:
        """Names of the families whose weights can be put in."""
        return (self.name,)

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The live network called `name` in the pipeline."""

    @abstractmethod
    def to(self, device: torch.device) -> Drawable:
        """Move every part."""

    @abstractmethod
    def encode_text(self, captions: list[str]) -> Conditioning:
        """Text conditioning of B captions: tensors [B, ...]; {} for a family that reads no text. Differentiable."""

    def null_conditioning(self) -> Conditioning:
        """What stands for no caption: tensors [1, ...]."""
        return self.encode_text([""])

    def negative_conditioning(self) -> Conditioning:
        """What drawing leads away from where there is no negative prompt: tensors [1, ...]."""
        return self.null_conditioning()

    @property
    @abstractmethod
    def text(self) -> list[TextTower]:
        """The text encoders, for methods that train through them."""

    @abstractmethod
    def replace_tokenizer(self, encoder_name: str, tokenizer: Any) -> None:
        """Give the text encoder of that name another tokenizer."""

    @abstractmethod
    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        """The stock diffusers pipeline around these parts, for TEXT_TO_IMAGE, IMAGE_TO_IMAGE or INPAINT.

        Called with `pipeline_inputs`, the picture's settings and one generator a picture. Raises UserError for a task
        that there is none for.
        """

    @abstractmethod
    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        """The arguments by which the pipeline takes what is already encoded. `negative` is the encoding of a negative
        prompt, or `negative_conditioning` where there is none; both have B rows.
        """

    def guidance_inputs(
        self, scale: float, negative_prompt: str, true_cfg_scale: float | None = None
    ) -> dict[str, float]:
        """The arguments by which the pipeline takes the guidance scale and, where guidance is built into a model, that
        of a second call. UserError for the latter where there is no other.
        """
        if true_cfg_scale is not None:
            raise UserError("true_cfg_scale is for a model with built-in guidance (FLUX dev): use guidance_scale.")
        return {"guidance_scale": scale}

    def reference_inputs(self, size: tuple[int, int], reference: Image.Image | None) -> dict[str, Any]:
        """The arguments by which the pipeline draws (width, height) pixels from a reference of that size, or none; of a
        model that takes one.
        """
        return {}

    def quantise(self, precision: str) -> None:
        """Keep the denoisers' linear weights in 8 or 4 bits (see `trainer.families.quantised`), for good. Before `to`
        and before a method attaches. UserError where bitsandbytes is missing.
        """
        from trainer.families import quantised

        for net in (net for net in self.nets if net.part == DENOISER):
            module = self.module(net.name)
            kind = next(p.dtype for p in module.parameters())
            quantised.quantise(module, precision, FULL_PRECISION, kind)

    def own_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """LoRA of other programs with the layers of the model's first code taken for diffusers' modules."""
        return tensors


class Family(Drawable):
    """A loaded base model. It lies on one device; its weights are frozen until a method attaches.

    A base model may be one half of a model (Kandinsky 2.2's prior and decoder). Then `usual_companion` names the other
    half, `load` takes its source as a fourth argument, and `load_drawable` loads both as one Drawable.

    What other programs call its weights is the family's to say, too: `ui_files`, `export_comfyui` and
    `ui_embedding_keys` for the files in comfyui/, `save_single_file` for a whole checkpoint, `card_tags`, `card_header`
    and `how_to` for the model card.
    """

    recommended: ClassVar[dict[str, dict[str, Any]]]  # settings by method, "any" for all
    ui_files: ClassVar[bool] = True  # whether ComfyUI and A1111 load adapters for it
    ui_adapters: ClassVar[tuple[str, ...]] = ("lora",)  # the values of adapter_type that `export_comfyui` can write
    # key in embeddings.safetensors -> in an embedding file for ComfyUI and A1111, and in a file bundled with a LoRA
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {}
    card_program: ClassVar[str | None] = "diffusers"  # what `how_to` draws with; None: predict.py alone
    card_tags: ClassVar[tuple[str, ...]] = ()  # of the model card, beside the task's and the method's
    dropped_picture_share: ClassVar[float] = 1.0  # of the samples that are dropped: those with `null_picture`, too
    notes: ClassVar[tuple[str, ...]] = ()  # what a user should know of how the data set is used
    own_settings: ClassVar[tuple[str, ...]] = ()  # of those that only some have (trainer.config.FOR_SOME)
    objective: Objective

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

    @classmethod
    def usual_companion(cls, source: str) -> str | None:
        """Where the other half lies unless a setting says otherwise; None for a model that is whole."""
        return None

    @classmethod
    def load_drawable(cls, source: str, companion: str | None, dtype: torch.dtype) -> Drawable:
        """All that drawing takes, frozen, on the CPU. Raises `families.NoCompanion` where the other half is missing."""
        return cls.load(source, frozenset({DENOISER, TEXT, VAE}), dtype)

    @classmethod
    def drawn_geometry(cls, source: str, companion: str | None) -> Geometry:
        """Of the pictures that `load_drawable` gives."""
        return cls.geometry(source)

    @classmethod
    def check(cls, settings: JobSettings) -> None:
        """Raise UserError for settings that this family has no use for."""
        if settings.companion_model is not None:
            raise UserError("companion_model is for a base model that is one half of two: leave it out for this one.")

    @classmethod
    def check_own(cls, settings: JobSettings) -> None:
        """Raise UserError for a setting that only other families have."""
        for name in FOR_SOME:
            if name not in cls.own_settings and getattr(settings, name) != JobSettings.model_fields[name].default:
                raise UserError(f"{name} is nothing that {settings.base_model} has: leave it out.")

    @classmethod
    def begin(cls, settings: JobSettings, dataset: PreparedDataset, folder: Path) -> JobSettings:
        """The settings with the base model to train from, once the data set is known: the one that they name, or one
        that a family builds for the job and writes into `folder`. Called on the first process.
        """
        return settings

    @classmethod
    def figures(cls, loss: float) -> dict[str, float]:
        """What else a mean loss is told as, by name."""
        return {}

    def save_base(self, folder: Path) -> None:
        """Write beside weights what builds the model that they fit, of a family whose base models jobs build."""

    @abstractmethod
    def free(self, part: str) -> None:
        """Let one part leave memory; it cannot be used again."""

    @abstractmethod
    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        """Latents and everything of the conditioning that is not text: the unit that is cached."""

    def null_picture(self) -> Conditioning:
        """What takes the place of a sample's own conditioning when it is dropped, without a batch dimension; names
        that are not in it are kept (a picture's size).
        """
        return {}

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction in fp32, time and sign canonical (see trainer.objectives)."""

    def attended(self, captions: list[str], tokens: Sequence[str]) -> tuple[list[Any], Tensor]:
        """The denoiser's layers of attention to text (diffusers' Attention), and which of the states of B captions, as
        the text encoders read them, are of these tokens: bool [B, L]. Of a family with token_attention_penalty.
        """
        raise NotImplementedError(self.name)

    def store_in_fp8(self) -> None:
        """Keep the denoiser's linear and convolution weights in 8 bits, cast back layer by layer as they are used.
        For good: their lower bits are lost. After a method's `attach`, whose LoRA keeps its precision.
        """
        from diffusers.hooks import apply_layerwise_casting

        for net in (net for net in self.nets if net.part == DENOISER):
            module = self.module(net.name)
            kind = next(p.dtype for n, p in module.named_parameters() if ".lora_" not in n)
            apply_layerwise_casting(module, torch.float8_e4m3fn, kind, skip_modules_pattern=FULL_PRECISION)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in every net."""
        for net in self.nets:
            module = self.module(net.name)
            if module is not None:
                # transformers' name, then diffusers'
                enable = getattr(module, "activation_checkpointing_enable", None)
                (enable or module.enable_gradient_checkpointing)()

    def enable_xformers(self) -> None:
        """Attention by xFormers in the denoiser. UserError where the package is missing."""
        for net in (net for net in self.nets if net.part == DENOISER):
            try:
                self.module(net.name).enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError) as error:  # not installed; no CUDA device
                raise UserError(f"enable_xformers: {error}; install xformers on a CUDA machine or leave it.") from error

    def save_pipeline(self, folder: Path) -> None:
        """Write the stock pipeline with the nets as they are now, as a folder that diffusers loads by its path. All
        parts must be loaded.
        """
        self.pipeline().save_pretrained(folder)

    @classmethod
    def card_header(cls, manifest: Manifest, place: Place) -> dict[str, Any]:
        """What the YAML at the head of a model card says beside what all cards say; diffusers reads some of it."""
        return {}

    @abstractmethod
    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Write an adapter's weights (diffusers' keys) as a file that ComfyUI and A1111 load."""

    def describe(self) -> dict[str, str]:
        """What the headers of exported files need to know of the loaded model: diffusers' prediction_type."""
        return {}

    def save_single_file(self, path: Path) -> None:
        """Write the model as one checkpoint file with the original program's keys; UserError where there is none."""
        raise UserError(f"a {self.name} is not written as one file: leave single_file out, the folder is complete.")

    @classmethod
    def how_to(cls, manifest: Manifest, base_model: str, place: Place) -> str:
        """Python that draws with the weights in diffusers, for the model card; `base_model` as its reader has it.

        Of method full it is asked for only where the place holds the whole pipeline.
        """
        whole = manifest.method == "full"
        source = place.name if whole else base_model
        code = [
            "import torch",
            "from diffusers import DiffusionPipeline",
            *cls._imports_for(manifest, place),
            "",
            f'pipe = DiffusionPipeline.from_pretrained({quoted(source)}, torch_dtype={cls.drawing_dtype}).to("cuda")',
        ]
        if not whole and (lora := place.first(LORA_FILE, ADAPTER)):
            code.append(f"pipe.load_lora_weights({quoted(place.name)}, weight_name={quoted(lora)})")
        code += cls._tokens_for(manifest, place)
        return "\n".join([*code, f"picture = {cls._call_with(f'a photo of {manifest.called}')}.images[0]"])

    @classmethod
    def _call_with(cls, prompt: str) -> str:
        """Python that calls `pipe`."""
        return f"pipe({quoted(prompt)})"

    @classmethod
    def _imports_for(cls, manifest: Manifest, place: Place) -> list[str]:
        if not manifest.tokens:
            return []
        download = ["from huggingface_hub import hf_hub_download"] if place.repository else []
        return [*download, "from safetensors.torch import load_file"]

    @classmethod
    def _tokens_for(cls, manifest: Manifest, place: Place) -> list[str]:
        """Lines of Python that put the new tokens into `pipe`, where the weights have some."""
        return []

    def times(self, uniform: Tensor, data: Tensor) -> Tensor:
        """The times that uniform numbers stand for, of samples as `data`: [B]."""
        return self.objective.times(uniform)

    def probe(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """The prediction at the batch's own times: [B, ...]."""
        t = self.times(batch.uniform, batch.data)
        return self.predict(self.objective.mix(batch.data, batch.noise, t), t, conditioning)

    def sample_losses(self, batch: Batch, conditioning: Conditioning, snr_gamma: float | None) -> Tensor:
        """The weighted, masked denoising loss of each sample: [B]."""
        t = self.times(batch.uniform, batch.data)
        error = (self.probe(batch, conditioning) - self.objective.target(batch.data, batch.noise, t)).square()
        return masked_mean(error, batch.mask) * self.objective.weights(t, snr_gamma)

    def training_loss(self, batch: Batch, conditioning: Conditioning, snr_gamma: float | None) -> Tensor:
        """What is minimised: the mean of `sample_losses`, a scalar."""
        return self.sample_losses(batch, conditioning, snr_gamma).mean()
