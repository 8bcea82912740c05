"""ZipLoRA's merge (Shah et al. 2023, "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs", 2311.13600).

Each column of a layer's change gets a share of the subject's and one of the style's: with m over the columns,

    delta W = m_subject * delta W_subject + m_style * delta W_style                                          (eq. 3)

and the shares minimise what the whole model predicts otherwise than each LoRA on its own does on its own pictures,
plus the overlap of the two shares of a layer (eq. 4, the overlap as a cosine). Columns belong to a layer's inputs, so
that the shares scale the columns of the A matrices: what comes out is LoRA again, of the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import trange

from preprocessing.errors import UserError
from trainer import artifact
from trainer.adapter_keys import ALPHA, DOWN, UP, lora_config_of
from trainer.devices import training_attention
from trainer.families.base import DENOISER, Family
from trainer.kohya import alpha_of
from trainer.methods import adapters
from trainer.ranks import with_layers
from trainer.samples import Conditioning, Picture, Sample
from trainer.weights import Weights, modules

if TYPE_CHECKING:
    from PIL import Image

    from trainer.zip_lora import ZipSettings

SUBJECT, STYLE = 0, 1
Layers = dict[str, dict[str, dict[str, Tensor]]]  # net -> module -> part -> tensor


@dataclass(frozen=True)
class Shown:
    """What one LoRA draws on its own: samples, and its prompt's conditioning [1, ...]."""

    samples: list[Sample]
    conditioning: Conditioning


def as_picture(drawn: Image.Image) -> Picture:
    """A drawn picture as one to encode."""
    pixels = torch.from_numpy(np.array(drawn.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    return Picture(pixels, None, (drawn.height, drawn.width), (0, 0))


def check(subject: Weights, style: Weights) -> None:
    """Raise UserError unless the two can be zipped."""
    first, second = subject.manifest, style.manifest
    if first.family != second.family:
        raise UserError(f"weights are for a {first.family} and style_weights for a {second.family}: give two of one.")
    for name, weights in (("weights", subject), ("style_weights", style)):
        manifest = weights.manifest
        if manifest.method not in ("lora", "pivotal"):
            raise UserError(f"{name} are of method {manifest.method}: zip_lora joins weights of pivotal and lora.")
        if (kind := artifact.adapter_type(manifest.nets)) != "lora":
            raise UserError(f"{name} are of adapter_type {kind}, whose columns cannot be shared: train them as lora.")
        if any(config.get("use_dora") for config in manifest.nets.values()):
            raise UserError(f"{name} are DoRA, whose columns cannot be shared: train them without use_dora.")
        if any(net.startswith("text_encoder") for net in manifest.nets):
            raise UserError(f"{name} change the text encoder, which cannot be shared: train it without.")
    if second.tokens:
        raise UserError("style_weights have new tokens of their own: train the style with method lora.")


class Shares(nn.Module):
    """Scales the columns of two LoRAs' A matrices, which lie one above the other, by a share each.

    `only` SUBJECT or STYLE: that one as it was trained, and nothing of the other.
    """

    def __init__(self, ranks: tuple[int, int], columns: int):
        super().__init__()
        self.ranks, self.only = ranks, None
        self.shares = nn.Parameter(torch.ones(2, columns))

    def forward(self, weight: Tensor) -> Tensor:
        """[r1 + r2, in, ...] -> the same."""
        shares = self.shares
        if self.only is not None:
            shares = torch.zeros_like(shares).index_fill_(0, torch.tensor(self.only, device=shares.device), 1.0)
        rows = torch.cat([one.expand(rank, -1) for one, rank in zip(shares, self.ranks, strict=True)])
        return weight * rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))

    def overlap(self) -> Tensor:
        """|cosine| of the two shares."""
        return nn.functional.cosine_similarity(*self.shares, dim=0).abs()


def stacked(pair: tuple[Weights, Weights]) -> tuple[Layers, dict[str, tuple[int, int]]]:
    """Two LoRAs as one of the sum of their ranks that adds what both add, and the ranks by "net.module".

    Alphas are in the B matrices. A layer that one of them leaves alone has only the other's rows.
    """
    found: Layers = {}
    ranks: dict[str, list[int]] = {}
    for index, weights in enumerate(pair):
        for net, module, parts in modules(weights.tensors):
            rank = parts[DOWN].shape[0]
            up = parts[UP] * (alpha_of(module, rank, weights.manifest.nets[net]) / rank)
            before = found.setdefault(net, {}).get(module)
            down = parts[DOWN] if before is None else torch.cat([before[DOWN], parts[DOWN]])
            up = up if before is None else torch.cat([before[UP], up], dim=1)
            found[net][module] = {DOWN: down, UP: up, ALPHA: torch.tensor(float(down.shape[0]))}
            ranks.setdefault(f"{net}.{module}", [0, 0])[index] = rank
    return found, {name: (first, second) for name, (first, second) in ranks.items()}


class Zipped:
    """Two LoRAs in a family's denoisers as one, with shares to train."""

    def __init__(self, family: Family, pair: tuple[Weights, Weights]):
        self.family, self.pair = family, pair
        self.layers, ranks = stacked(pair)
        self.shares: dict[str, Shares] = {}
        for net in (net for net in family.nets if net.part == DENOISER and net.name in self.layers):
            module, layers = family.module(net.name), self.layers[net.name]
            state = {
                f"{net.name}.{name}.{part}": layers[name][part] for name in layers for part in (DOWN, UP)
            }  # as in adapter.safetensors
            adapters.put_in(module, net.name, LoraConfig(**lora_config_of(layers, {})), state)
            module.requires_grad_(False)
            for name in layers:
                down = module.get_submodule(name).lora_A[adapters.ADAPTER]
                self.shares[f"{net.name}.{name}"] = shares = Shares(ranks[f"{net.name}.{name}"], down.weight.shape[1])
                parametrize.register_parametrization(down, "weight", shares.to(down.weight.device))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [one.shares for one in self.shares.values()]

    @contextmanager
    def alone(self, only: int) -> Iterator[None]:
        """Inside, the family predicts as with one of the two LoRAs as it was trained."""
        for one in self.shares.values():
            one.only = only
        try:
            yield
        finally:
            for one in self.shares.values():
                one.only = None

    def detach(self) -> None:
        """Leave the family as it was."""
        for net in {name.partition(".")[0] for name in self.shares}:
            adapters.remove(self.family.module(net))

    def overlap(self) -> Tensor:
        """Sum over the layers that both change of the |cosine| of their shares."""
        both = [one.overlap() for one in self.shares.values() if all(one.ranks)]
        return torch.stack(both).sum() if both else torch.zeros(())

    def weights(self) -> Weights:
        """The subject's archive with the zipped LoRA in place of its own."""
        style = self.pair[STYLE].manifest
        device = self.parameters[0].device
        with torch.no_grad():
            found = {
                net: {
                    name: parts | {DOWN: self.shares[f"{net}.{name}"](parts[DOWN].to(device)).cpu()}
                    for name, parts in layers.items()
                }
                for net, layers in self.layers.items()
            }
        whole = with_layers(self.pair[SUBJECT], found)
        told = f"Zipped with a style's weights, whose trigger word is {style.trigger_word}."
        return Weights(whole.manifest.model_copy(update={"chosen": told, "scores": {}}), whole.tensors, whole.rows)


def train(zipped: Zipped, shown: list[Shown], settings: ZipSettings) -> list[float]:
    """Find the shares, on one sample of each LoRA's pictures a step; the losses."""
    family, losses = zipped.family, []
    optimiser = torch.optim.AdamW(zipped.parameters, lr=settings.learning_rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(settings.seed)
    bar = trange(settings.steps, desc="zip", mininterval=1.0, dynamic_ncols=True)
    for _ in bar:
        loss = settings.overlap_penalty * zipped.overlap()
        with training_attention(family.device), torch.autocast(family.device.type, enabled=family.device.type != "cpu"):
            for which in (SUBJECT, STYLE):
                loss = loss + difference(zipped, shown[which], which, random)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        bar.set_postfix({"loss": f"{losses[-1]:.4f}"}, refresh=False)
    return losses


def difference(zipped: Zipped, shown: Shown, which: int, random: torch.Generator) -> Tensor:
    """Mean squared distance of what both together predict from what one predicts alone, at a random time of one of its
    pictures: a scalar.
    """
    family, device = zipped.family, zipped.family.device
    sample = shown.samples[int(torch.randint(len(shown.samples), (), generator=random))]
    data = sample.mean[None].to(device)
    noise = torch.randn(data.shape, generator=random).to(device)
    t = family.times(torch.rand(1, generator=random).to(device), data)
    noisy = family.objective.mix(data, noise, t)
    conditioning = {name: value[None].to(device) for name, value in sample.conditioning.items()} | shown.conditioning
    with torch.no_grad(), zipped.alone(which):
        target = family.predict(noisy, t, conditioning)
    return (family.predict(noisy, t, conditioning) - target).square().mean()
