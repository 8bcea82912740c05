"""OmniGen2 as a base model: Qwen2.5-VL reads the instruction, FLUX's VAE makes the latents, of references as well."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from preprocessing.errors import UserError
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families import INDEX, model_config
from trainer.families.base import DENOISER, FLOW_SCHEDULERS, TEXT, TEXT_TO_IMAGE, Geometry, Net, quoted
from trainer.families.omnigen2.pipeline import OmniGen2Pipeline
from trainer.families.omnigen2.transformer import (
    MOST_REFERENCES,
    OmniGen2Transformer2DModel,
    References,
    patches_of,
)
from trainer.families.pipeline_family import PipelineFamily
from trainer.objectives import Flow
from trainer.samples import Conditioning, Picture, Sample, padded

if TYPE_CHECKING:
    from trainer.model_card import Place

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
TARGETS = {
    "attention": ATTENTION,
    "attention_conv": ATTENTION + FEED_FORWARD,  # there are no convolutions
    "all": (*ATTENTION, *FEED_FORWARD, "norm1.linear", "x_embedder", "ref_image_patch_embedder"),
}
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
SYSTEM_WITHOUT_PROMPT = "You are a helpful assistant that generates images."
MOST_TOKENS = 256  # of the whole chat, as the published pipeline reads it
# the shift of training grows with the picture, from exp(0.5) at 256 tokens to exp(1.15) at 4096
SHIFTS, TOKENS = (0.5, 1.15), (256, 4096)
PATCHES, SIZES = "reference_patches", "reference_sizes"


def chat(prompt: str, system: str = SYSTEM) -> str:
    """Qwen's chat template around a prompt, without a place for the answer."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"


class _Parts(SimpleNamespace):
    """What the model consists of, by the names of its folders."""

    @property
    def components(self) -> dict[str, Any]:
        return vars(self)


class OmniGen2(PipelineFamily):
    """Text to image, edits by instruction, and drawing from several reference pictures."""

    name: ClassVar[str] = "omnigen2"
    denoiser: ClassVar[str] = "transformer"
    drawing_dtype: ClassVar[torch.dtype] = torch.bfloat16
    schedulers: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = FLOW_SCHEDULERS
    draw_options: ClassVar[tuple[str, ...]] = ("image_guidance_scale", "references")
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (("processor", "mllm", "qwen"),)
    ui_files: ClassVar[bool] = False
    card_program: ClassVar[str | None] = "Python, with Atelier"
    card_tags: ClassVar[tuple[str, ...]] = ("omnigen2",)
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": {
            "max_train_steps": 1000,
            "train_batch_size": 1,
            "lora_rank": 8,
            "lora_targets": "attention",
            "learning_rate": 1e-4,
            "text_embedding_lr": 1e-3,
            "preservation_weight": 0.0,
        },
        "full": {"learning_rate": 1e-5},
        "prefix": {"learning_rate": 1e-4, "max_train_steps": 4000, "train_batch_size": 2},
        "draw": {"guidance_scale": 5.0, "image_guidance_scale": 2.0, "num_inference_steps": 50},
    }
    dropped_picture_share: ClassVar[float] = 0.5  # no prompt, no references: what guidance leads away from

    def __init__(self, pipe: Any, dtype: torch.dtype):
        super().__init__(pipe, dtype)
        self.objective = Flow(logit_normal=True)
        self.nets = (
            Net("transformer", DENOISER, TARGETS),
            Net("mllm", TEXT, {}),  # is read through, and never adapted
        )
        if pipe.processor is not None:
            pipe.processor.padding_side = "right"
            # what of a caption is read
            pipe.processor.model_max_length = MOST_TOKENS - len(pipe.processor(chat("")).input_ids)

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        vae, transformer = (model_config(source, part) for part in ("vae", "transformer"))
        per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry(per_latent * transformer["patch_size"], vae["sample_size"])

    @classmethod
    def check(cls, settings: JobSettings) -> None:
        super().check(settings)
        if settings.method not in ("lora", "full", "prefix"):
            raise UserError(f"method {settings.method} is not for OmniGen2: use lora, full or prefix.")
        if settings.train_text_encoder:
            raise UserError("train_text_encoder is not for OmniGen2, whose text encoder is a language model: leave it.")

    @classmethod
    def _from_folder(cls, source: str, dtype: torch.dtype, given: dict[str, Any]) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

        parts: dict[str, Any] = {"source": source, "transformer": None, "vae": None, "mllm": None, "processor": None}
        if "transformer" not in given:
            parts["transformer"] = OmniGen2Transformer2DModel.from_pretrained(
                source, subfolder="transformer", torch_dtype=dtype
            )
        if "vae" not in given:  # in fp32, for the detail
            parts["vae"] = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
        if "mllm" not in given:
            whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, subfolder="mllm", dtype=dtype)
            parts["mllm"] = whole.model.language_model  # no picture is read by it, and no word written
            parts["processor"] = Qwen2Tokenizer.from_pretrained(source, subfolder="processor")
        return _Parts(**parts)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self._pipe.transformer.config.in_channels

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self._pipe.vae.config.block_out_channels) - 1)

    def encode(
        self, pictures: list[Picture], captions: list[str], references: list[Picture] | None = None
    ) -> list[Sample]:
        """As `Family.encode`; the pictures' conditions are the references."""
        samples = super().encode(pictures, captions)
        shown = [self._references(picture.conditions) for picture in pictures]
        return [replace(sample, conditioning=one) for sample, one in zip(samples, shown, strict=True)]

    def references_of(self, images: list[Image.Image]) -> Conditioning:
        """What reference pictures, RGB and of sides that a token fits into, add to the conditioning: [1, ...]."""
        pixels = [torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1 for image in images]
        return {name: value[None].to(self.device) for name, value in self._references(tuple(pixels)).items()}

    def _references(self, pixels: tuple[Tensor, ...]) -> Conditioning:
        """Patches and sizes (see References) of pictures [3, H, W], of one sample."""
        if len(pixels) > MOST_REFERENCES:
            raise UserError(f"{len(pixels)} reference pictures are too many: OmniGen2 tells {MOST_REFERENCES} apart.")
        size, channels = self._pipe.transformer.config.patch_size, self.channels
        latents = [self.encode_pixels(one[None])[0].cpu() for one in pixels]
        patches = padded([patches_of(one, size) for one in latents])
        return {
            PATCHES: torch.stack(patches) if patches else torch.zeros(0, 0, size * size * channels),
            SIZES: torch.tensor([[one.shape[1] // size, one.shape[2] // size] for one in latents])
            .reshape(-1, 2)
            .long(),
        }

    def null_picture(self) -> Conditioning:
        """No references."""
        return self._references(())

    def encode_text(self, captions: list[str]) -> Conditioning:
        """context [B, L, D], as long as the longest, and its mask [B, L]."""
        return self._read([chat(caption) for caption in captions])

    def _read(self, chats: list[str]) -> Conditioning:
        (tower,) = self.text
        tokens = tower.tokenizer(
            chats, padding="longest", max_length=MOST_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        output = tower.encoder(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
        return {"context": output.last_hidden_state, "mask": tokens.attention_mask}

    def null_conditioning(self) -> Conditioning:
        """What no prompt was trained as; it is not what drawing leads away from."""
        return self._read([chat("", SYSTEM_WITHOUT_PROMPT)])

    def negative_conditioning(self) -> Conditioning:
        return self.encode_text([""])

    def times(self, uniform: Tensor, data: Tensor) -> Tensor:
        size = self._pipe.transformer.config.patch_size
        tokens = data.shape[-2] * data.shape[-1] // size**2
        slope = (SHIFTS[1] - SHIFTS[0]) / (TOKENS[1] - TOKENS[0])
        return self.objective.times(uniform, math.exp(SHIFTS[0] + slope * (tokens - TOKENS[0])))

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        references = None
        if PATCHES in conditioning:
            references = References(conditioning[PATCHES].to(self.dtype), conditioning[SIZES])
        # the model's time runs from noise to data, and its velocity points that way
        velocity = self._pipe.transformer(
            noisy.to(self.dtype), 1 - t, conditioning["context"].to(self.dtype), conditioning["mask"], references
        )
        return -velocity.float()

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> OmniGen2Pipeline:
        if task != TEXT_TO_IMAGE:
            raise UserError("OmniGen2 changes a picture by an instruction: give it as references in place of image.")
        return OmniGen2Pipeline(self, FlowMatchEulerDiscreteScheduler())

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"text": conditioning, "negative": negative}

    def save_pipeline(self, folder: Path) -> None:
        """The published layout: the transformer as it is now, everything else as it was loaded from."""
        source = Path(self._pipe.source)
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            parts = [f"{part}/*" for part in ("vae", "mllm", "processor", "scheduler")]
            source = Path(snapshot_download(str(source), allow_patterns=[INDEX, *parts]))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / INDEX, folder / INDEX)
        for part in ("vae", "mllm", "processor", "scheduler"):
            if (source / part).is_dir():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
        self._pipe.transformer.save_pretrained(folder / "transformer")

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Nothing is written: the adapter has diffusers' keys, and these programs' names for it were not tried."""

    @classmethod
    def how_to(cls, manifest: Manifest, base_model: str, place: Place) -> str:
        """Python with this program's own packages: diffusers has no such model."""
        whole = manifest.method == "full"
        lines = [
            "from pathlib import Path",
            "",
            "from trainer.drawing import DrawSettings",
            "from trainer.generate import Generator",
            "",
            f"generator = Generator({quoted(place.name if whole else base_model)})",
            *([] if whole else ['generator.use(Path("trained_model.tar"))']),
            f"settings = DrawSettings(prompt={quoted(f'a photo of {manifest.title}')})",
            'generator.draw(settings)[0].save("picture.png")',
        ]
        return "\n".join(lines)
