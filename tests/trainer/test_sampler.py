"""Which pictures a step trains on: one bucket a step, every picture as often as any other."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from trainer.sampler import Balance, steps

UNEQUAL = ["wide"] * 9 + ["tall"]
THREE = ["a", "b", "a", "c", "c", "a", "c", "c"]


def first(buckets: list[str], count: int, seed: int, number: int) -> list[list[int]]:
    return list(islice(steps(buckets, count, seed), number))


@pytest.mark.parametrize("count", [1, 4, 13])
@pytest.mark.parametrize("buckets", [UNEQUAL, THREE])
def test_a_step_is_of_one_bucket_and_of_the_size_asked_for(buckets, count):
    for indices in first(buckets, count, 0, 60):
        assert len(indices) == count
        assert len({buckets[i] for i in indices}) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("buckets", [UNEQUAL, THREE, ["one"] * 7, ["one"], list("abcdefgh")])
def test_every_picture_is_seen_equally_often(buckets, seed):
    count, number = 4, 50 * len(buckets)
    seen = Counter(i for indices in first(buckets, count, seed, number) for i in indices)
    expected = count * number / len(buckets)
    assert set(seen) == set(range(len(buckets)))
    # a bucket may be a step ahead or behind at any time, and its pictures an epoch apart by one
    sizes = Counter(buckets)
    for i, times in seen.items():
        assert abs(times - expected) <= 2 * count / sizes[buckets[i]] + 1


@pytest.mark.parametrize("buckets", [UNEQUAL, THREE])
def test_no_bucket_falls_behind_for_long(buckets):
    chosen = [buckets[indices[0]] for indices in first(buckets, 2, 3, 400)]
    for name, size in Counter(buckets).items():
        share = size / len(buckets)
        for number in range(1, 401):
            assert abs(chosen[:number].count(name) - share * number) < 2


@pytest.mark.parametrize("count", [1, 4, 5])
def test_inside_a_bucket_every_picture_comes_once_before_any_comes_twice(count):
    order: dict[str, list[int]] = {}
    for indices in first(THREE, count, 1, 200):
        order.setdefault(THREE[indices[0]], []).extend(indices)
    for name, sequence in order.items():
        members = [i for i, bucket in enumerate(THREE) if bucket == name]
        for start in range(0, len(sequence) - len(members), len(members)):
            assert sorted(sequence[start : start + len(members)]) == members


def test_epochs_are_shuffled_anew():
    epochs = {tuple(indices) for indices in first(["one"] * 8, 8, 0, 5)}
    assert len(epochs) == 5


def test_the_order_is_the_seeds_alone():
    assert first(UNEQUAL, 4, 7, 50) == first(UNEQUAL, 4, 7, 50)
    assert first(UNEQUAL, 4, 0, 50) != first(UNEQUAL, 4, 1, 50)


def test_a_small_step_takes_the_order_up_where_a_large_one_would():
    large, small = first(["one"] * 6, 4, 0, 6), first(["one"] * 6, 2, 0, 12)
    assert [i for indices in large for i in indices] == [i for indices in small for i in indices]


@pytest.mark.parametrize("count", [1, 4])
def test_a_picture_that_counts_several_times_is_seen_so_much_more_often(count):
    repeats = [3, 1, 1, 1, 2, 1, 1, 1]
    number = 60 * sum(repeats)
    seen = Counter(i for indices in islice(steps(THREE, count, 0, repeats), number) for i in indices)
    for i, times in enumerate(repeats):
        assert seen[i] == pytest.approx(count * number * times / sum(repeats), rel=0.05)
    assert first(THREE, 4, 0, 20) == list(islice(steps(THREE, 4, 0, [1] * len(THREE)), 20))


def test_without_weights_the_order_is_what_it_always_was():
    assert first(THREE, 3, 0, 6) == [[1, 1, 1], [7, 3, 4], [2, 5, 0], [6, 7, 3], [0, 5, 2], [4, 6, 6]]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("buckets", [["one"] * 8, THREE])
def test_each_group_has_the_share_of_its_weight_however_many_pictures_it_has(buckets, count):
    balance, repeats = Balance((0, 0, 0, 0, 0, 1, 1, 2), (2.0, 1.0, 0.5)), [1, 1, 3, 1, 1, 1, 1, 1]
    number = 2000
    drawn = list(islice(steps(buckets, count, 0, repeats, balance), number))
    seen = Counter(i for indices in drawn for i in indices)
    shares = [sum(seen[i] for i in range(8) if balance.groups[i] == group) / (number * count) for group in range(3)]
    assert shares == pytest.approx([2 / 3.5, 1 / 3.5, 0.5 / 3.5], rel=0.02)
    for i in range(5):  # inside a group as before
        assert seen[i] == pytest.approx(number * count * 2 / 3.5 * repeats[i] / 7, rel=0.05)
    assert all(len({buckets[i] for i in indices}) == 1 for indices in drawn)
    again = steps(buckets, count, 0, repeats, balance)
    assert list(islice(again, 1200, number)) == drawn[1200:]  # as a resumed run goes on
    assert drawn != list(islice(steps(buckets, count, 1, repeats, balance), number))


def test_a_step_mixes_the_groups_and_one_without_pictures_has_no_share():
    balance = Balance((0, 0, 0, 0, 1, 1, 1, 1, 2), (1.0, 1.0, 5.0))
    for indices in islice(steps(["one"] * 9, 4, 3, [1] * 8 + [0], balance), 50):
        assert sorted(balance.groups[i] for i in indices) == [0, 0, 1, 1]
