"""An autoregressive model of 8-bit pictures: p(x) = product over pixels and channels of p(value | values before, text).

words -> TextEncoder -> keys, values -----v
pixels -> frequency prior -> vertical stack -> horizontal stack -> SubPixelHead -> 256 logits a channel
                    class, pooled words ---^---------^
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from trainer.families.pixel_ar.head import SubPixelHead
from trainer.families.pixel_ar.text import TextEncoder
from trainer.families.pixel_ar.trunk import Condition, Trunk, TrunkShape

HEAD_CHANNELS = 32  # of an attention head over the words, at most


class PixelAR(ModelMixin, ConfigMixin):
    """The model. `vocab_size` 0 reads no text, `num_classes` 0 no class; class `num_classes` stands for none."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        levels: int = 256,
        hidden_dim: int = 256,
        num_layers: int = 8,
        use_frequency_prior: bool = True,
        num_classes: int = 0,
        vocab_size: int = 0,
        text_embed_dim: int = 512,
        num_text_layers: int = 6,
        text_nhead: int = 8,
        max_text_length: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__()
        reads_text = vocab_size > 0
        self.text_encoder = None
        if reads_text:
            self.text_encoder = TextEncoder(vocab_size, text_embed_dim, num_text_layers, text_nhead, max_text_length)
        self.classes = nn.Embedding(num_classes + 1, text_embed_dim) if num_classes else None
        heads = max(n for n in range(1, 17) if hidden_dim % n == 0 and (n == 1 or hidden_dim // n >= HEAD_CHANNELS))
        self.trunk = Trunk(
            TrunkShape(
                channels=channels,
                levels=levels,
                hidden_dim=hidden_dim,
                num_layers=num_layers,
                heads=heads,
                use_frequency_prior=use_frequency_prior,
                text_channels=text_embed_dim if reads_text else 0,
                condition_channels=text_embed_dim if reads_text or num_classes else 0,
                dropout=dropout,
            )
        )
        self.head = SubPixelHead(hidden_dim, channels, levels)

    def condition(self, ids: Tensor | None, class_label: Tensor | None) -> Condition:
        """What B pictures are drawn for: token ids [B, L] (see text.token_ids), and classes [B]."""
        words = mask = vector = None
        if self.text_encoder is not None:
            words, mask, vector = self.text_encoder(ids)
            mask = mask[:, None, None]
        if self.classes is not None:
            own = self.classes(class_label)
            vector = own if vector is None else vector + own
        return Condition(words, mask, vector)

    def forward(self, values: Tensor, ids: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """Values [B, channels, H, W], 0 .. levels - 1 -> logits [B, channels, H, W, levels]."""
        return torch.stack(self._logits(values, ids, class_label), dim=1)

    def nats(self, values: Tensor, ids: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """The negative log-likelihood of each value, in nats: [B, channels, H, W]."""
        logits = self._logits(values, ids, class_label)
        parts = [
            F.cross_entropy(one.float().flatten(0, 2), values[:, channel].flatten().long(), reduction="none")
            for channel, one in enumerate(logits)
        ]
        return torch.stack([part.view(values[:, 0].shape) for part in parts], dim=1)

    def _logits(self, values: Tensor, ids: Tensor | None, class_label: Tensor | None) -> list[Tensor]:
        last = values.permute(0, 2, 3, 1).long()
        return self.head(self.trunk(last, self.condition(ids, class_label)), last)


def bits_per_dim(nats: Tensor | float) -> Tensor | float:
    """The mean of nats over all values of a picture, in bits."""
    return nats / math.log(2)
