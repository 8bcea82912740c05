"""FLUX.1 dev and schnell: a rectified-flow transformer that reads T5's states and CLIP's pooled text.

Black Forest Labs 2024. The latents [B, C, h, w] are packed 2x2 into tokens [B, h/2 * w/2, 4 C]; a token's position is
(0, row, column), text lies at (0, 0, 0). dev has guidance built in (distilled into an embedding), which is 1 in
training; where the config has no such embedding, guidance at drawing is by a second call without the prompt. dev makes
the second call for a negative prompt alone, or where it is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import flux_keys
from trainer.artifact import Manifest
from trainer.branches import HOLE, Layout
from trainer.families import model_config, resolve
from trainer.families.base import (
    DENOISER,
    FLOW_SCHEDULERS,
    IMAGE_TO_IMAGE,
    INPAINT,
    TEXT,
    TEXT_TO_IMAGE,
    Geometry,
    Net,
)
from trainer.families.flux_branches import Branches, Condition, Conditions, remove_branches
from trainer.families.pipeline_family import PipelineFamily
from trainer.objectives import Flow
from trainer.samples import Conditioning

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLPS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm.linear", "x_embedder", "context_embedder")
TRANSFORMER_TARGETS = {
    "attention": ATTENTION,
    "attention_conv": ATTENTION + MLPS,  # there are no convolutions
    "all": ATTENTION + MLPS + MODULATIONS,
}
# OminiControl's layers: all that a condition's tokens go through (peft matches the whole name)
CONDITION_TARGETS = (
    r"x_embedder|transformer_blocks\.\d+\.(?:norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(?:norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
CLIP_TARGETS = dict.fromkeys(TRANSFORMER_TARGETS, ("q_proj", "k_proj", "v_proj", "out_proj"))
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
TRUE_CFG_SCALE = 2.0  # of dev with a negative prompt: beside the built-in guidance, which acts in both calls
DEV_T5_TOKENS, SCHNELL_T5_TOKENS = 512, 256  # the lengths of T5 that the two were trained with


class Flux(PipelineFamily):
    """FLUX.1; `guided` where the transformer has the guidance embedding (dev)."""

    name: ClassVar[str] = "flux"
    usual: ClassVar[Geometry] = Geometry(stride=16, resolution=1024)
    denoiser: ClassVar[str] = "transformer"
    drawing_dtype: ClassVar[torch.dtype] = torch.bfloat16  # its activations overflow fp16
    schedulers: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = FLOW_SCHEDULERS
    pipelines: ClassVar[dict[str, str]] = {
        TEXT_TO_IMAGE: "FluxPipeline",
        IMAGE_TO_IMAGE: "FluxImg2ImgPipeline",
        INPAINT: "FluxInpaintPipeline",
    }
    towers: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("tokenizer", "text_encoder", "clip_l"),
        ("tokenizer_2", "text_encoder_2", "t5"),
    )
    pooled: ClassVar[str | None] = "text_encoder"
    # as ComfyUI calls them in a file for both
    ui_embedding_keys: ClassVar[dict[str, tuple[str, str]]] = {"clip_l": ("clip_l", "clip_l"), "t5": ("t5xxl", "t5xxl")}
    card_tags: ClassVar[tuple[str, ...]] = ("flux", "flux-diffusers")
    recommended: ClassVar[dict[str, dict[str, Any]]] = {
        "any": {
            "max_train_steps": 1000,
            "train_batch_size": 1,
            "lora_rank": 16,
            "lora_targets": "attention",
            "learning_rate": 4e-4,
            "text_embedding_lr": 1e-3,
            "preservation_weight": 0.0,
        },
        "full": {"learning_rate": 1e-5},
        "prefix": {"learning_rate": 1e-4},
        "condition": {"lora_rank": 4, "learning_rate": 1.0},
        "draw": {"guidance_scale": 3.5, "num_inference_steps": 28},
    }

    def __init__(self, pipe: Any, dtype: torch.dtype):
        super().__init__(pipe, dtype)
        config = pipe.scheduler.config
        # where the shift of drawing grows with the picture, that of the usual size
        self.objective = Flow(math.exp(config.max_shift) if config.use_dynamic_shifting else config.shift)
        self.guided = pipe.transformer is not None and pipe.transformer.config.guidance_embeds
        self.nets = (
            Net("transformer", DENOISER, TRANSFORMER_TARGETS),
            Net("text_encoder", TEXT, CLIP_TARGETS),
            Net("text_encoder_2", TEXT, {}),  # T5 is read through, and never adapted: it is larger than all SDXL
        )
        self.branches: Branches | None = None
        self._layouts: tuple[Layout, ...] = ()
        if pipe.text_encoder_2 is not None:
            # one module and not two that share a weight, so that new tokens are put into both names alike
            pipe.text_encoder_2.set_input_embeddings(pipe.text_encoder_2.get_input_embeddings())
            longest = DEV_T5_TOKENS if self.guided else SCHNELL_T5_TOKENS
            pipe.tokenizer_2.model_max_length = min(pipe.tokenizer_2.model_max_length, longest)

    @classmethod
    def geometry(cls, source: str) -> Geometry:
        if Path(resolve(source)).is_file():
            return cls.usual
        vae = model_config(source, "vae")
        return Geometry(2 ** len(vae["block_out_channels"]), vae["sample_size"])

    @classmethod
    def recommended_for(cls, source: str) -> dict[str, dict[str, Any]]:
        """schnell needs four steps and no guidance."""
        if Path(resolve(source)).is_file() or model_config(source, "transformer")["guidance_embeds"]:
            return cls.recommended
        return cls.recommended | {"draw": {"guidance_scale": 1.0, "num_inference_steps": 4}}

    @classmethod
    def _from_file(cls, path: Path, dtype: torch.dtype, left_out: dict[str, None]) -> Any:
        """FLUX.1 is published as a file of the transformer alone; text encoders and VAE come from the Hub."""
        with safe_open(path, framework="numpy") as file:
            guided = any("guidance_in." in key for key in file.keys())  # noqa: SIM118 (no mapping)
        repository = DEV if guided else SCHNELL
        given = dict(left_out)
        if "transformer" not in left_out:
            given["transformer"] = FluxTransformer2DModel.from_single_file(
                str(path), config=repository, subfolder="transformer", torch_dtype=dtype
            )
        return cls._from_folder(repository, dtype, given)

    def encode_text(self, captions: list[str]) -> Conditioning:
        clip, t5 = self.text
        return {
            "context": t5.encoder(self._tokens(t5, captions)).last_hidden_state,
            "pooled": clip.encoder(self._tokens(clip, captions)).pooler_output,
        }

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if not self._layouts:
            return self._velocity(noisy, t, conditioning)
        if HOLE in conditioning:  # every row has its own tokens, and their number differs
            rows = [{name: value[i : i + 1] for name, value in conditioning.items()} for i in range(len(noisy))]
            return torch.cat([self._under(noisy[i : i + 1], t[i : i + 1], row) for i, row in enumerate(rows)])
        return self._under(noisy, t, conditioning)

    def _under(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with self.branches.on(self.conditions_of(conditioning)):
            return self._velocity(noisy, t, conditioning)

    def conditions_of(self, conditioning: Conditioning) -> Conditions:
        """What `branches` are to compute for a conditioning as in `add_branches`."""
        given = [(layout, placement) for layout in self._layouts for placement in layout.placements]
        found = Conditions()
        pictures: list[Condition] = []
        for index, (layout, placement) in enumerate(given):
            latents = conditioning.get(f"condition_{index}")
            if latents is None:
                continue
            kept = None
            if layout.integrated:
                hole = conditioning[HOLE][0].flatten()
                found.known, found.generated, kept = latents, hole.nonzero().flatten(), (~hole).nonzero().flatten()
                if not len(kept):  # with nothing known there is no condition
                    continue
            pictures.append(Condition(latents, placement, kept, layout.independent, layout.adapter))
        if found.generated is None or len(found.generated):  # with nothing to draw there is nothing to condition
            found.pictures = pictures
        return found

    def condition_layers(self) -> tuple[str, str]:
        last = len(self._pipe.transformer.single_transformer_blocks) - 1
        return CONDITION_TARGETS, rf"single_transformer_blocks\.{last}\.(?:attn\.to_q|proj_mlp|proj_out)"

    def add_branches(self, layout: Layout) -> None:
        net = self._pipe.transformer
        if self.branches is None:
            remove_branches(net)  # some may be left of an attempt that was stopped
            self.branches = Branches(net)
        self._layouts += (layout,)
        theirs = {one.adapter for one in self._layouts}
        # an adapter that is no condition's is the text's and the picture's
        self.branches.main = next((name for name in getattr(net, "peft_config", {}) if name not in theirs), None)
        self.branches.settle()

    def remove_branches(self) -> None:
        remove_branches(self._pipe.transformer)
        self.branches, self._layouts = None, ()

    @contextmanager
    def conditioned(self, conditioning: Conditioning, strength: float) -> Iterator[None]:
        chosen = self.conditions_of(conditioning)
        reusable = all(one.independent for one in chosen.pictures)
        chosen.strength, chosen.stores = strength, {} if reusable else None
        self.branches.settle()
        with self.branches.on(chosen):
            yield

    @contextmanager
    def unconditioned(self) -> Iterator[None]:
        layouts, self._layouts = self._layouts, ()
        try:
            yield
        finally:
            self._layouts = layouts

    @property
    def pixels_per_token(self) -> int:
        """The side of a token in pixels."""
        return 2 ** len(self._pipe.vae.config.block_out_channels)

    def token_mask(self, hole: Tensor) -> Tensor:
        """Pixels to draw, bool [H, W] -> the tokens that hold one of them, bool [1, h / 2, w / 2]."""
        return nn.functional.max_pool2d(hole[None].float(), self.pixels_per_token).bool()

    def _sequence(self, noisy: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The tokens [B, n, 4 C] that are read beside the text, the picture's first, and their ids [n, 3]."""
        tokens = FluxPipeline._pack_latents(noisy.to(self.dtype), *noisy.shape)
        return tokens, grid_ids(*noisy.shape[-2:], noisy.device)

    def _velocity(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        context = conditioning["context"].to(self.dtype)
        tokens, ids = self._sequence(noisy, conditioning)
        velocity = self._pipe.transformer(
            hidden_states=tokens,
            timestep=t,
            guidance=torch.ones_like(t) if self.guided else None,
            pooled_projections=conditioning["pooled"].to(self.dtype),
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3, device=noisy.device),
            img_ids=ids,
        ).sample[:, : height * width // 4]
        return FluxPipeline._unpack_latents(velocity, height, width, 1).float()

    @classmethod
    def _pooling(cls, encoder: str) -> str:
        # transformers had it below text_model before version 5
        return f'getattr(pipe.{encoder}, "text_model", pipe.{encoder})'

    def pipeline_inputs(self, conditioning: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["context"],
            "pooled_prompt_embeds": conditioning["pooled"],
            "negative_prompt_embeds": negative["context"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }

    def guidance_inputs(
        self, scale: float, negative_prompt: str, true_cfg_scale: float | None = None
    ) -> dict[str, float]:
        if not self.guided:
            return {"true_cfg_scale": super().guidance_inputs(scale, negative_prompt, true_cfg_scale)["guidance_scale"]}
        if true_cfg_scale is None:
            true_cfg_scale = TRUE_CFG_SCALE if negative_prompt else 1.0
        elif true_cfg_scale == 1 and negative_prompt:
            raise UserError("negative_prompt has no effect with true_cfg_scale 1: raise it or leave it out.")
        return {"guidance_scale": scale, "true_cfg_scale": true_cfg_scale}

    def export_comfyui(self, path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        flux_keys.save(path, tensors, manifest, self._pipe.transformer)

    def own_keys(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return flux_keys.to_own_names(tensors, self._pipe.transformer)


def grid_ids(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of the tokens of latents [.., height, width]: [height * width / 4, 3], in fp32, for bf16 cannot
    count beyond 256.
    """
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, torch.float32)
