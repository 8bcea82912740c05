"""OmniGen2's transformer, on Lumina 2's blocks; the names of its tensors are the published checkpoint's.

    text [B, L, D] --caption_embedder--> context_refiner --------------------\
    references [B, K, T, p p C] --ref_image_patch_embedder + index-->          > [text | references | picture]
                                  ref_image_refiner, each by itself ---------/      layers --> norm_out
    picture [B, C, H, W] --patches--> x_embedder --> noise_refiner ----------/

Rows of a batch differ in how much text and how many references they have, of which sizes. Nothing is packed: each row
keeps its padding, positions are counted over what is valid and attention sees nothing else, which comes to the same and
needs no length on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2TransformerBlock,
)
from torch import Tensor, nn

MOST_REFERENCES = 5
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class References:
    """Reference pictures as patches [B, K, T, p p C], and how many rows and columns of these each has, [B, K, 2]; both
    are filled up with zeros, and a picture of size 0 is none.
    """

    patches: Tensor
    sizes: Tensor


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Latents, time (0 is noise, 1 is data), text and references -> the velocity data - noise."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Lumina2TransformerBlock",)
    _skip_layerwise_casting_patterns = ("x_embedder", "ref_image_patch_embedder", "norm", "time_caption_embed")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2304,
        num_layers: int = 26,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 24,
        num_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, int, int] = (32, 32, 32),
        axes_lens: tuple[int, int, int] = (300, 512, 512),
        text_feat_dim: int = 1024,
        timestep_scale: float = 1.0,
    ):
        """The arguments are the published config.json's; `axes_lens` is read and not used: angles are computed for any
        position.
        """
        super().__init__()
        if hidden_size // num_attention_heads != sum(axes_dim_rope):
            raise ValueError(f"heads of {hidden_size // num_attention_heads} have no axes_dim_rope {axes_dim_rope}")
        patch = patch_size**2 * in_channels
        self.x_embedder = nn.Linear(patch, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch, hidden_size)
        self.image_index_embedding = nn.Parameter(0.02 * torch.randn(MOST_REFERENCES, hidden_size))
        self.time_caption_embed = Lumina2CombinedTimestepCaptionEmbedding(
            hidden_size=hidden_size, cap_feat_dim=text_feat_dim, norm_eps=norm_eps
        )

        def blocks(count: int, modulation: bool) -> nn.ModuleList:
            size = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps)
            return nn.ModuleList(Lumina2TransformerBlock(*size, modulation=modulation) for _ in range(count))

        self.noise_refiner = blocks(num_refiner_layers, True)
        self.ref_image_refiner = blocks(num_refiner_layers, True)
        self.context_refiner = blocks(num_refiner_layers, False)
        self.layers = blocks(num_layers, True)
        self.norm_out = LuminaLayerNormContinuous(
            embedding_dim=hidden_size,
            conditioning_embedding_dim=min(hidden_size, 1024),
            elementwise_affine=False,
            eps=1e-6,
            out_dim=patch_size**2 * (out_channels or in_channels),
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text_hidden_states: Tensor,
        text_attention_mask: Tensor,
        references: References | None = None,
    ) -> Tensor:
        """[B, C, H, W], [B] in [0, 1], [B, L, D] and its mask [B, L] (padded on the right) -> [B, C, H, W]."""
        rows, columns = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        scaled = timestep * self.config.timestep_scale
        time, text = self.time_caption_embed(text_hidden_states, scaled, text_hidden_states)
        mask = text_attention_mask.bool()
        picture = self.x_embedder(patches_of(hidden_states, self.config.patch_size))
        if references is not None and not references.patches.shape[1] * references.patches.shape[2]:
            references = None
        at = _Positions.of(mask, (rows, columns), references)

        text = self._through(self.context_refiner, text, mask, self._rotations(at.text), None)
        picture = self._through(self.noise_refiner, picture, None, self._rotations(at.picture), time)
        parts, masks, places = [text], [mask], [at.text]
        if references is not None:
            parts.append(self._refined(references, at, time))
            masks.append(at.valid.flatten(1))
            places.append(at.references.flatten(1, 2))
        joint = torch.cat([*parts, picture], dim=1)
        seen = torch.cat([*masks, mask.new_ones(picture.shape[:2])], dim=1)
        rotations = self._rotations(torch.cat([*places, at.picture], dim=1))
        joint = self._through(self.layers, joint, seen, rotations, time)
        found = self.norm_out(joint[:, -rows * columns :], time)
        return picture_of(found, (rows, columns), self.config.patch_size)

    def _refined(self, references: References, at: _Positions, time: Tensor) -> Tensor:
        """[B, K T, D]: every reference refined as a row of its own, by the time of its sample."""
        count, pictures, tokens = references.patches.shape[:3]
        embedded = self.ref_image_patch_embedder(references.patches)
        embedded = embedded + self.image_index_embedding[:pictures, None].to(embedded.dtype)
        valid = at.valid.flatten(0, 1)
        # of a reference that there is none of all is seen: nothing to see is no number, and nobody looks at it later
        seen = valid | ~valid.any(dim=1, keepdim=True)
        rotations = self._rotations(at.references.flatten(0, 1))
        times = time.repeat_interleave(pictures, dim=0)
        refined = self._through(self.ref_image_refiner, embedded.flatten(0, 1), seen, rotations, times)
        return refined.view(count, pictures * tokens, -1)

    def _through(
        self, blocks: nn.ModuleList, states: Tensor, mask: Tensor | None, rotations: Tensor, time: Tensor | None
    ) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                states = self._gradient_checkpointing_func(block, states, mask, rotations, time)
            else:
                states = block(states, mask, rotations, time)
        return states

    def _rotations(self, positions: Tensor) -> Tensor:
        """Positions [..., 3] -> complex [..., head / 2]: each axis turns its share of a head's numbers."""
        turned = []
        for axis, size in enumerate(self.config.axes_dim_rope):
            steps = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
            turned.append(positions[..., axis, None].double() / ROPE_BASE**steps)
        angles = torch.cat(turned, dim=-1)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


@dataclass(frozen=True)
class _Positions:
    """Where tokens lie on the three axes. Text moves along all at once; each picture lies on its own first coordinate,
    as far behind the last one as that was long.
    """

    text: Tensor  # [B, L, 3]
    picture: Tensor  # [B, N, 3]
    references: Tensor | None = None  # [B, K, T, 3]
    valid: Tensor | None = None  # [B, K, T]

    @classmethod
    def of(cls, mask: Tensor, size: tuple[int, int], references: References | None) -> _Positions:
        text = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[..., None].expand(-1, -1, 3)
        start = mask.sum(dim=1)
        index = torch.arange(size[0] * size[1], device=mask.device)
        grid = torch.stack([index // size[1], index % size[1]], dim=-1).expand(len(mask), -1, -1)
        if references is None:
            return cls(text, _on(start, grid))
        sizes, index = references.sizes, torch.arange(references.patches.shape[2], device=mask.device)
        long = sizes.amax(dim=-1)
        starts = start[:, None] + long.cumsum(dim=1) - long
        columns = sizes[..., 1:].clamp(min=1)
        grids = torch.stack([index // columns, index % columns], dim=-1)
        valid = index < sizes.prod(dim=-1, keepdim=True)
        return cls(text, _on(start + long.sum(dim=1), grid), _on(starts, grids), valid)


def _on(first: Tensor, grid: Tensor) -> Tensor:
    """Rows and columns [..., N, 2] with their first coordinate [...] before them: [..., N, 3]."""
    return torch.cat([first[..., None, None].expand(*grid.shape[:-1], 1), grid], dim=-1)


def patches_of(latents: Tensor, size: int) -> Tensor:
    """[..., C, H, W] -> [..., H/p W/p, p p C]: patches row by row, in each the channels lie innermost."""
    channels, height, width = latents.shape[-3:]
    split = latents.unflatten(-1, (width // size, size)).unflatten(-3, (height // size, size))
    # [..., C, h, p, w, p] -> [..., h, w, p, p, C]
    return split.movedim(-5, -1).transpose(-4, -3).reshape(*latents.shape[:-3], -1, size * size * channels)


def picture_of(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The inverse of `patches_of` for `grid` rows and columns: [B, h w, p p C] -> [B, C, H, W]."""
    split = patches.view(len(patches), *grid, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    return split.reshape(len(patches), -1, grid[0] * size, grid[1] * size)
