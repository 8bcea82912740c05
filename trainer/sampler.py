"""Which pictures an optimiser step trains on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch

from trainer.draws import generator


def steps(
    buckets: Sequence[Hashable], count: int, seed: int, repeats: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Endless optimiser steps: `count` indices each, all of one bucket, `buckets[i]` being the bucket of picture i.

    A bucket comes as often as its share of the pictures asks for (largest remainder first), and inside it every
    picture comes once before any comes twice; so each picture is seen equally often, however small its bucket. Picture
    i counts as `repeats[i]` pictures; 0 leaves it out.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, bucket in enumerate(buckets):
        if times := repeats[index] if repeats else 1:
            members[bucket] += [index] * times
    streams = [_shuffled(indices, seed, number) for number, indices in enumerate(members.values())]
    shares = [len(indices) / sum(map(len, members.values())) for indices in members.values()]
    # a random start, so that the first step is not always of the largest bucket
    credit = torch.rand(len(shares), generator=generator(seed, "buckets"), dtype=torch.float64).tolist()
    while True:
        credit = [have + share for have, share in zip(credit, shares, strict=True)]
        chosen = max(range(len(credit)), key=credit.__getitem__)
        credit[chosen] -= 1
        yield [next(streams[chosen]) for _ in range(count)]


def _shuffled(indices: list[int], seed: int, bucket: int) -> Iterator[int]:
    epoch = 0
    while True:
        order = torch.randperm(len(indices), generator=generator(seed, "epoch", bucket, epoch))
        yield from (indices[i] for i in order.tolist())
        epoch += 1
