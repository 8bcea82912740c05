"""Which pictures an optimiser step trains on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.draws import generator


@dataclass(frozen=True)
class Balance:
    """Groups of pictures that are trained on by weight, however many pictures each has."""

    groups: tuple[int, ...]  # of each picture
    weights: tuple[float, ...]  # of each group; only their proportions count


def steps(
    buckets: Sequence[Hashable],
    count: int,
    seed: int,
    repeats: Sequence[int] | None = None,
    balance: Balance | None = None,
) -> Iterator[list[int]]:
    """Endless optimiser steps: `count` indices each, all of one bucket, `buckets[i]` being the bucket of picture i.

    A bucket comes as often as its share of the pictures asks for (largest remainder first), and inside it every
    picture comes once before any comes twice; so each picture is seen equally often, however small its bucket. Picture
    i counts as `repeats[i]` pictures; 0 leaves it out.

    With `balance` the pictures of a group together have the share of its weight, in which they are as before; inside a
    bucket its groups take turns in the same way. A group without pictures has no share.
    """
    members: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    sizes: Counter[int] = Counter()
    for index, bucket in enumerate(buckets):
        if times := repeats[index] if repeats else 1:
            group = balance.groups[index] if balance else 0
            members[bucket][group] += [index] * times
            sizes[group] += times
    streams, amounts = [], []
    for number, groups in enumerate(members.values()):
        if balance is None:
            streams.append(_shuffled(groups[0], seed, str(number)))
            amounts.append(len(groups[0]))
            continue
        each = [balance.weights[group] * len(indices) / sizes[group] for group, indices in groups.items()]
        own = [_shuffled(indices, seed, f"{number}/{group}") for group, indices in groups.items()]
        streams.append(_mixed(own, each, generator(seed, "groups", number)))
        amounts.append(sum(each))
    for chosen in _turns(amounts, generator(seed, "buckets")):
        yield [next(streams[chosen]) for _ in range(count)]


def _turns(amounts: Sequence[float], start: torch.Generator) -> Iterator[int]:
    """Endless places in `amounts`, each as often as its share of their sum (largest remainder first)."""
    shares = [amount / sum(amounts) for amount in amounts]
    # a random start, so that the first step is not always of the largest bucket
    credit = torch.rand(len(shares), generator=start, dtype=torch.float64).tolist()
    while True:
        credit = [have + share for have, share in zip(credit, shares, strict=True)]
        chosen = max(range(len(credit)), key=credit.__getitem__)
        credit[chosen] -= 1
        yield chosen


def _mixed(streams: Sequence[Iterator[int]], amounts: Sequence[float], start: torch.Generator) -> Iterator[int]:
    return (next(streams[chosen]) for chosen in _turns(amounts, start))


def _shuffled(indices: list[int], seed: int, stream: str) -> Iterator[int]:
    epoch = 0
    while True:
        order = torch.randperm(len(indices), generator=generator(seed, "epoch", stream, epoch))
        yield from (indices[i] for i in order.tolist())
        epoch += 1
