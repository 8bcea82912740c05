"""Intervals for the mean of paired differences, by resampling (Efron 1979, "Bootstrap methods: another look at the
jackknife"; the percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, CONFIDENCE = 2000, 0.95


class Interval(NamedTuple):
    """A mean, and the bounds in which it lies with CONFIDENCE."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float] | np.ndarray, pictures: Sequence[int]) -> Interval:
    """The mean of `values`, of which `pictures` says the picture each belongs to, and its interval.

    Values are drawn anew within each picture: the interval is about noise and time on these pictures. What other
    pictures would say it cannot know, least of all from two of them.
    """
    values, owners = np.asarray(values, dtype=np.float64), np.asarray(pictures)
    random = np.random.default_rng(0)  # the same values, the same interval
    sums = np.zeros(RESAMPLES)
    for owner in np.unique(owners):
        own = values[owners == owner]
        sums += own[random.integers(len(own), size=(RESAMPLES, len(own)))].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sums / len(values), (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high))
