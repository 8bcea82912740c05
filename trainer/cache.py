"""What is encoded once, before training: latents of every picture, and text where the method leaves it alone.

Everything is stored by sample, never by step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from preprocessing.prepared import PreparedDataset, PreparedItem
from trainer.families.base import Family
from trainer.methods.base import Method
from trainer.sampler import Balance
from trainer.samples import Conditioning, Picture, Sample, load_pictures, padded

ENCODE_BATCH = 8
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cache:
    """Samples by picture, mirrored ones beside them; text by caption, on the training device."""

    samples: list[Sample]
    mirrored: list[Sample]
    text: dict[str, Conditioning]  # tensors [1, ...]; "" is the null conditioning
    repeats: tuple[int, ...] | None = None  # how often each picture counts; None: all once
    balance: Balance | None = None  # of several concepts: how often each is trained on
    null: Conditioning = field(default_factory=dict)  # what a dropped sample's own conditioning is replaced by
    null_share: float = 1.0  # in this share of the dropped samples

    def buckets(self) -> list[tuple[int, ...]]:
        """The latent shape of each picture."""
        return [tuple(sample.mean.shape) for sample in self.samples]

    def without(self, pictures: Collection[int]) -> Cache:
        """The same with these pictures never trained on."""
        repeats = self.repeats or (1,) * len(self.samples)
        return replace(self, repeats=tuple(0 if i in pictures else count for i, count in enumerate(repeats)))


Loaded = tuple[PreparedItem, Picture]


def _runs(pictures: Iterable[Loaded]) -> Iterator[list[Loaded]]:
    """Neighbours of one size, at most ENCODE_BATCH together; no more than these are held."""
    run: list[Loaded] = []
    for item, picture in pictures:
        if run and (len(run) == ENCODE_BATCH or run[0][1].pixels.shape != picture.pixels.shape):
            yield run
            run = []
        run.append((item, picture))
    if run:
        yield run


def encode_dataset(
    family: Family, dataset: PreparedDataset, flip: bool, progress: Progress, method: Method | None = None
) -> list[Sample]:
    """Every picture of the data set as a sample, in the data set's order, with what the method adds to it."""
    samples: list[Sample] = []
    for run in _runs(load_pictures(dataset, flip)):
        pictures = [picture for _, picture in run]
        targets = [method.picture(picture) for picture in pictures] if method else pictures
        encoded = family.encode(targets, [item.caption for item, _ in run])
        for sample, picture in zip(encoded, pictures, strict=True):
            added = method.sample_conditioning(family, picture) if method else {}
            samples.append(replace(sample, conditioning=sample.conditioning | added))
        progress("cache", len(samples), len(dataset.items))
    return samples


@torch.no_grad()
def encode_captions(family: Family, captions: Sequence[str]) -> dict[str, Conditioning]:
    """Each caption's text conditioning, [1, ...]; the empty one's is the family's null."""
    encoded = {"": family.null_conditioning()}
    for caption in dict.fromkeys(captions):
        if caption:
            encoded[caption] = family.encode_text([caption])
    return encoded


def build(
    family: Family, dataset: PreparedDataset, text: Sequence[str], progress: Progress, method: Method | None = None
) -> Cache:
    """Encode the data set and the captions in `text`."""
    samples = encode_dataset(family, dataset, False, progress, method)
    mirrored = encode_dataset(family, dataset, True, progress, method) if dataset.horizontal_flip else []
    repeats = tuple(item.repeats for item in dataset.items)
    with torch.no_grad():
        null = family.null_picture()
    balance = None
    if len(dataset.concepts) > 1:
        balance = Balance(tuple(item.concept for item in dataset.items), tuple(c.weight for c in dataset.concepts))
    return Cache(samples, mirrored, encode_captions(family, text), repeats, balance, null, family.dropped_picture_share)


def lookup(text: dict[str, Conditioning], captions: list[str]) -> Conditioning:
    """The cached conditioning of a batch of captions: tensors [B, ...], of texts of several lengths as the longest."""
    rows = [text[caption] for caption in captions]
    return {name: torch.cat(padded([row[name] for row in rows])) for name in rows[0]}
