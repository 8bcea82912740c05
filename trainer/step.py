"""One training step's forward pass: text, denoising loss, the base model's preservation, the method's penalty."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from preprocessing.concepts import trigger_pattern, without_triggers
from trainer.alignment import PromptAlignment
from trainer.cache import Cache, lookup
from trainer.config import JobSettings
from trainer.draws import Draw, draw
from trainer.families.base import Family
from trainer.methods import regularisers
from trainer.methods.base import Method
from trainer.methods.token_maps import TokenMaps
from trainer.samples import Batch, Conditioning, padded

PRESERVED_EVERY = 3  # one sample in so many also serves to hold the base model's predictions


class BatchMaker:
    """Turns picture indices into batches, with the draws that belong to (seed, step, position)."""

    def __init__(self, cache: Cache, settings: JobSettings, device: torch.device, preserved: tuple[str, ...]):
        self.cache, self.settings, self.device, self.preserved = cache, settings, device, preserved

    def without(self, pictures: Collection[int]) -> BatchMaker:
        """The same with these pictures never trained on."""
        return BatchMaker(self.cache.without(pictures), self.settings, self.device, self.preserved)

    def make(self, step: int | str, indices: list[int], positions: range, count: int) -> Batch:
        """The batch of the pictures `indices`, which stand at `positions` of the optimiser step's `count` samples."""
        settings, samples, draws = self.settings, [], []
        for index, position in zip(indices, positions, strict=True):
            shape = self.cache.samples[index].mean.shape
            drawn = draw(settings.seed, step, (position, count), shape, settings.noise_offset)
            mirrored = bool(self.cache.mirrored) and drawn.flip < 0.5
            samples.append((self.cache.mirrored if mirrored else self.cache.samples)[index])
            draws.append(drawn)
        pairs = list(zip(samples, draws, strict=True))
        dropped = [d.drop_caption < settings.caption_dropout for d in draws]
        masks = [s.mask if s.mask is not None else torch.ones_like(s.mean[:1]) for s in samples]
        masked = any(sample.mask is not None for sample in samples)
        null = {name: value.cpu() for name, value in self.cache.null.items()}
        nothing_shown = [d.drop_caption < settings.caption_dropout * self.cache.null_share for d in draws]
        own = [s.conditioning | (null if drop else {}) for s, drop in zip(samples, nothing_shown, strict=True)]
        return Batch(
            data=torch.stack([s.mean + s.std * d.posterior for s, d in pairs]).to(self.device),
            noise=torch.stack([d.noise for d in draws]).to(self.device),
            uniform=torch.tensor([d.uniform for d in draws], device=self.device),
            captions=["" if drop else s.caption for s, drop in zip(samples, dropped, strict=True)],
            mask=torch.stack(masks).to(self.device) if masked else None,
            conditioning={name: torch.stack(padded([one[name] for one in own])).to(self.device) for name in own[0]},
            preserved=self._preserved(positions, draws),
            keys=tuple(f"{settings.seed}/{step}/{position}" for position in positions),
        )

    def _preserved(self, positions: range, draws: list[Draw]) -> list[tuple[int, str]]:
        if not self.preserved:
            return []
        prompts = [self.preserved[int(drawn.prompt * len(self.preserved))] for drawn in draws]
        return [(i, prompts[i]) for i, position in enumerate(positions) if position % PRESERVED_EVERY == 0]


class TrainStep(nn.Module):
    """The loss of a batch. Its parameters are the family's nets, so that it is what accelerate wraps."""

    def __init__(self, family: Family, method: Method, cache: Cache, settings: JobSettings):
        super().__init__()
        modules = {net.name: family.module(net.name) for net in family.nets}
        self.nets = nn.ModuleDict({name: module for name, module in modules.items() if module is not None})
        self._family, self._method, self._settings, self._text = family, method, settings, cache.text
        self._alignment = None
        if settings.alignment_weight:
            self._alignment = PromptAlignment(family, method, cache.text, settings)

    def forward(self, batch: Batch) -> Tensor:
        batch = self._method.prepared(self._family, batch)
        text = read = self.conditioning(batch.captions)
        if scale := self._settings.conditioning_noise:
            # no caption stays what guidance leads away from
            pairs = zip(batch.keys, batch.captions, strict=True)
            text = regularisers.noisy(text, [f"{key}/noise" if caption else "" for key, caption in pairs], scale)
        loss = self._denoising_loss(batch, batch.conditioning | text)
        if weight := self._settings.conditioning_norm_penalty:
            loss = loss + weight * self._norm_distance(batch.captions, read)
        if self._alignment is not None:
            loss = loss + self._settings.alignment_weight * self._alignment(batch, self.conditioning)
        if batch.preserved:
            loss = loss + self._settings.preservation_weight * self._preservation(batch)
        return loss + self._method.penalty()

    def _denoising_loss(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """The family's loss and, where it is asked for, the attention to the new tokens outside of the mask."""
        gamma, weight = self._settings.snr_gamma, self._settings.token_attention_penalty
        if not weight or batch.mask is None:
            return self._family.training_loss(batch, conditioning, gamma)
        layers, columns = self._family.attended(self._method.words(batch.captions), self._method.tokens())
        maps = TokenMaps(layers)
        with maps.reading():
            loss = self._family.training_loss(batch, conditioning, gamma)
        return loss + weight * maps.outside(columns, batch.mask).mean()

    def prepared(self, batch: Batch) -> Batch:
        """A batch as the questions below take it, with what the method adds for every step but no dropout."""
        return self._method.prepared(self._family, batch, dropout=False)

    def losses(self, batch: Batch) -> Tensor:
        """The denoising loss of each sample of a prepared batch, without preservation or penalty: [B]."""
        conditioning = batch.conditioning | self.conditioning(batch.captions)
        return self._family.sample_losses(batch, conditioning, self._settings.snr_gamma)

    def base_losses(self, batch: Batch) -> Tensor:
        """The same of the base model, whose text is read from the cache: [B]."""
        with self._method.disabled(self._family):
            conditioning = batch.conditioning | lookup(self._text, batch.captions)
            return self._family.sample_losses(batch, conditioning, self._settings.snr_gamma)

    def drift(self, batch: Batch) -> Tensor:
        """Squared distance of each prediction from the base model's, as a share of the latter's square: [B].

        Both are asked by the prompt alone.
        """
        batch, base_text = self._method.prompted(batch), lookup(self._text, batch.captions)
        with self._method.disabled(self._family):
            base = self._family.probe(batch, batch.conditioning | base_text)
        adapted = self._family.probe(batch, batch.conditioning | self.conditioning(batch.captions))
        return (adapted - base).square().flatten(1).sum(dim=1) / base.square().flatten(1).sum(dim=1)

    def conditioning(self, captions: list[str]) -> Conditioning:
        """The text conditioning of B captions as the adapted model reads them: tensors [B, ...]."""
        if not self._method.needs_text_grad:
            return lookup(self._text, captions)
        encoded = self._family.encode_text(self._method.words(captions))
        if "" not in captions:
            return encoded
        # the null conditioning need not be the encoding of "" (SDXL's is zeros), so it is put in its place
        dropped = torch.tensor([caption == "" for caption in captions], device=self._family.device)
        null = self._family.null_conditioning() if self._method.changes_null else self._text[""]
        chosen = {}
        for name, value in encoded.items():
            nothing = null[name].to(value).expand(len(value), *[-1] * (value.ndim - 1))
            chosen[name] = torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), *padded([nothing, value]))
        return chosen

    def _norm_distance(self, captions: list[str], read: Conditioning) -> Tensor | float:
        """How far the length of what was read for B captions is from the base model's with the class word for the
        trigger: the sum of `regularisers.norm_distance` over the captions with the trigger, divided by B.
        """
        words = self._settings.class_words
        pattern = trigger_pattern(*words)
        plain = {i: without_triggers(c, words) for i, c in enumerate(captions) if pattern.search(c)}
        kept = [i for i, caption in plain.items() if caption]
        if not kept:
            return 0.0
        found = {name: value[kept] for name, value in read.items()}
        return regularisers.norm_distance(found, lookup(self._text, [plain[i] for i in kept])).sum() / len(captions)

    def _preservation(self, batch: Batch) -> Tensor:
        """Mean squared distance to the base model's predictions on prompts without the trigger.

        Some of the batch's latents serve again, at other times; what they show does not matter, since the base
        model's answer to the prompt is the target (a prior by distillation, after Li & Hoiem 2016, arXiv:1606.09282).
        """
        family, kept = self._family, [index for index, _ in batch.preserved]
        prompts = [prompt for _, prompt in batch.preserved]
        # mostly noise: there the prompt decides what is drawn, later the picture itself does
        t = family.times((1 - batch.uniform[kept] ** 2).clamp(max=1 - 2**-24), batch.data)
        noisy = family.objective.mix(batch.data[kept], batch.noise[kept], t)
        fixed = {name: value[kept] for name, value in batch.conditioning.items()}
        base_text = lookup(self._text, prompts)
        with torch.no_grad(), self._method.disabled(family):
            target = family.predict(noisy, t, fixed | base_text)
        text = family.encode_text(prompts) if self._method.changes_text else base_text
        error = (family.predict(noisy, t, fixed | text) - target).square().flatten(1).mean(dim=1)
        # by the batch's size, not by how many were kept, so that processes and accumulation average to the same
        return error.sum() * PRESERVED_EVERY / len(batch.captions)
