"""What keeps trained text near the base model's: distances that serve as penalties, and noise on the conditioning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preprocessing.errors import UserError
from trainer.draws import normal
from trainer.samples import Conditioning

BANDS = 8  # of the vocabulary's principal axes, each with about the same share of its variance
MASK = "mask"  # in a conditioning: which tokens are read, [B, L]


class Spectrum:
    """How a vocabulary's variance is spread over its principal axes, and how far a few new rows are from that.

    With the vocabulary's mean m and covariance C = sum_k l_k v_k v_k^T, whose axes are parted into bands g of about
    equal variance, the new rows r_1 .. r_n have in each band the share

        s_g = 1/n sum_i sum_(k in g) (v_k . (r_i - m))^2  /  sum_(k in g) l_k

    of the vocabulary's variance, and their distance is mean_g (s_g - 1)^2. It is 0 where every band holds as much of
    the rows' second moment as of the vocabulary's. Unlike ||C' - C||_F with the rows' own covariance C', whose rank is
    n at the most, it is defined for one row, and rows drawn like the vocabulary's are close to its least value.
    """

    @torch.no_grad()
    def __init__(self, vocabulary: Tensor):
        """`vocabulary`: [V, D]."""
        rows = vocabulary.float()
        self._mean = rows.mean(dim=0)
        centred = rows - self._mean
        values, self._axes = torch.linalg.eigh(centred.T @ centred / len(rows))
        values = values.clamp(min=0)
        # the band in which the middle of an axis' variance lies; one that holds no axis is left out
        middle = (values.cumsum(0) - values / 2) / values.sum()
        bands = torch.nn.functional.one_hot((middle * BANDS).long().clamp(max=BANDS - 1), BANDS).to(values)
        self._bands = bands[:, bands.any(dim=0)]
        self._variance = values @ self._bands

    def shares(self, rows: Tensor) -> Tensor:
        """s_g of new rows [n, D]: [G]."""
        with torch.autocast(rows.device.type, enabled=False):
            return ((rows - self._mean) @ self._axes).square().mean(dim=0) @ self._bands / self._variance

    def distance(self, rows: Tensor) -> Tensor:
        """mean_g (s_g - 1)^2 of new rows [n, D], a scalar."""
        return (self.shares(rows) - 1).square().mean()


def lengths(conditioning: Conditioning) -> dict[str, Tensor]:
    """The mean Euclidean length of each caption's states over the tokens that are read, by the states' name: [B]."""
    found = {}
    for name, states in _states(conditioning).items():
        norms = states.float().norm(dim=-1, keepdim=True)
        found[name] = _over_tokens(norms, conditioning.get(MASK))[..., 0]
    return found


def norm_distance(found: Conditioning, wanted: Conditioning) -> Tensor:
    """(|c| / |c'| - 1)^2 of each of B captions' conditioning c and its reference c', with `lengths` for | |, the mean
    over the kinds of states: [B].
    """
    reference = lengths(wanted)
    terms = [(length / reference[name].to(length) - 1).square() for name, length in lengths(found).items()]
    return torch.stack(terms).mean(dim=0)


def meaning_distance(found: Conditioning, wanted: Conditioning) -> Tensor:
    """|m(c) - m(c')|^2 / |m(c')|^2 of each of B captions' conditioning c and its target c', the mean over the kinds of
    states: [B]. m is the mean over the tokens that are read: a caption's words stand at other places once one of them
    is so many tokens.
    """
    terms = []
    for name, states in _states(found).items():
        one = _over_tokens(states.float(), found.get(MASK))
        other = _over_tokens(wanted[name].to(one), wanted.get(MASK))
        terms.append((one - other).square().sum(dim=1) / other.square().sum(dim=1))
    return torch.stack(terms).mean(dim=0)


def noisy(conditioning: Conditioning, keys: Sequence[str], scale: float) -> Conditioning:
    """Text conditioning with c + scale * sd(c) * n in place of each state c [D], n standard normal, sd(c) the standard
    deviation of its own numbers; a sample whose key is "" is left as it is.

    The noise belongs to the samples' keys alone. NEFTune (Jain et al. 2023, arXiv:2310.05914) puts uniform noise on
    what a language model reads to the same end. UserError for a model that reads no states of text.
    """
    states = _states(conditioning)
    if not states:
        raise UserError("conditioning_noise: this base model reads no states of a text encoder: leave it out.")
    changed = dict(conditioning)
    for name, value in states.items():
        noise = [normal(value.shape[1:], key, name) if key else torch.zeros(value.shape[1:]) for key in keys]
        spread = value.detach().float().std(dim=-1, keepdim=True)
        changed[name] = (value.float() + scale * spread * torch.stack(noise).to(spread.device)).to(value.dtype)
    return changed


def _over_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of [B, L, D] over the tokens that `mask` [B, L] says are read, or all: [B, D]; of [B, D] itself."""
    if states.ndim == 2:
        return states
    if mask is None:
        return states.mean(dim=1)
    mask = mask.to(states)[..., None]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def _states(conditioning: Conditioning) -> Conditioning:
    """What text encoders give: vectors [B, D] and [B, L, D]."""
    return {name: value for name, value in conditioning.items() if name != MASK and value.is_floating_point()}
