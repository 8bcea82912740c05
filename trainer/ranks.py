"""LoRA of a lower rank, by singular value decomposition (Eckart and Young 1936: no other approximation of that rank is
nearer in the Frobenius norm), and LoRA out of the difference of two models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.adapter_keys import ALPHA, DOWN, UP, layers, lora_config_of
from trainer.kohya import alpha_of
from trainer.weights import Weights, modules

EXACT = 1e-12  # share of the energy below which singular values are rounding, in float64


@dataclass(frozen=True)
class Cut:
    """How many singular values of each layer stay: at most `rank` of them, and no more than hold a share `keep` of the
    sum of their squares (the squared Frobenius norm). None sets no limit."""

    rank: int | None = None
    keep: float | None = None

    def of(self, values: Tensor) -> int:
        """How many of the singular values [n], largest first; 1 at least."""
        count = len(values) if self.rank is None else min(self.rank, len(values))
        if self.keep is not None:
            shares = values.square().cumsum(0) / values.square().sum().clamp_min(torch.finfo(values.dtype).tiny)
            count = min(count, int((shares < self.keep - EXACT).sum()) + 1)
        return max(1, count)


@dataclass
class Kept:
    """What a change of rank left: squared Frobenius norms before and after, by layer, and the ranks."""

    before: dict[str, float]
    after: dict[str, float]
    ranks: dict[str, int]

    def share(self, names: Iterable[str] | None = None) -> float:
        """Of the squared Frobenius norm of all layers together, or of some; 1 where there was nothing."""
        chosen = list(self.before if names is None else names)
        total = sum(self.before[name] for name in chosen)
        return sum(self.after[name] for name in chosen) / total if total else 1.0

    def told(self) -> str:
        """In one sentence."""
        worst = min(self.before, key=lambda name: self.share([name]))
        ranks = sorted(set(self.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return (
            f"rank {shown}: {100 * self.share():.2f} % of the squared norm is kept, least in {worst} "
            f"({100 * self.share([worst]):.2f} %)"
        )


Svd = tuple[Tensor, Tensor, Tensor]  # U [out, n], values [n], Vh [n, in], in float64


def svd_of_product(up: Tensor, down: Tensor) -> Svd:
    """Of up [out, r] @ down [r, in] in time that is linear in out and in: only an [r, r] matrix is decomposed."""
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().T)
    inner, values, outer = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner, values, outer @ right.T


def factors(svd: Svd, count: int) -> tuple[Tensor, Tensor]:
    """down [count, in] and up [out, count] whose product is the best approximation of that rank, equally long each."""
    inner, values, outer = svd
    roots = values[:count].sqrt()
    return (roots[:, None] * outer[:count]).float(), (inner[:, :count] * roots).float()


def resized(weights: Weights, cut: Cut) -> tuple[Weights, Kept]:
    """The same weights with each layer's rank cut; a layer whose rank is not above the cut stays as it is, to the bit.

    Of DoRA the direction's change is cut and the magnitudes stay, so that the approximation is not the best one there.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(dict)
    kept = Kept({}, {}, {})
    for net, module, parts in modules(weights.tensors):
        config = weights.manifest.nets[net]
        down, up = parts[DOWN], parts[UP]
        rank = down.shape[0]
        alpha = alpha_of(module, rank, config)
        inner, values, outer = svd_of_product(up.flatten(1), down.flatten(1))
        values = values * alpha / rank
        count, name = cut.of(values), f"{net}.{module}"
        kept.before[name] = values.square().sum().item()
        kept.after[name] = values[:count].square().sum().item()
        kept.ranks[name] = count
        if count < rank:
            small_down, small_up = factors((inner, values, outer), count)
            parts |= {DOWN: small_down.reshape(count, *down.shape[1:]), UP: small_up.reshape(-1, count, *up.shape[2:])}
            alpha = float(count)
        found[net][module] = parts | {ALPHA: torch.tensor(alpha)}
    return with_layers(weights, found), kept


def with_layers(weights: Weights, found: dict[str, dict[str, dict[str, Tensor]]]) -> Weights:
    """The weights with these layers in place of their own: net -> module -> part -> tensor, alphas among the parts."""
    nets = {net: lora_config_of(layers_of, {}) for net, layers_of in found.items()}
    tensors = {
        f"{net}.{module}.{part}": value.contiguous()
        for net, layers_of in found.items()
        for module, parts in layers_of.items()
        for part, value in parts.items()
        if part != ALPHA
    }
    changes = {}
    if nets:
        main = artifact.main_config(nets)
        changes = {"lora_rank": main["r"], "lora_alpha": float(main["lora_alpha"]), "lora_targets": None}
    manifest = weights.manifest.model_copy(update={"nets": nets, "settings": weights.manifest.settings | changes})
    return replace(weights, manifest=manifest, tensors=tensors)


@dataclass(frozen=True)
class Extracted:
    """LoRA out of a fine-tuned model, and what it cannot hold: names of tensors -> squared norm of their change."""

    weights: Weights
    kept: Kept
    left_out: dict[str, float]

    def told(self) -> list[str]:
        """In sentences."""
        rest, whole = sum(self.left_out.values()), sum(self.kept.before.values())
        lines = [self.kept.told()]
        if rest:
            names = sorted(self.left_out, key=lambda name: -self.left_out[name])
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            lines.append(
                f"{100 * rest / (rest + whole):.2f} % of the change's squared norm is in biases, norms and embeddings, "
                f"which LoRA cannot hold: {shown}"
            )
        return lines


def extracted(
    nets: dict[str, nn.Module], tuned: Callable[[str], dict[str, Tensor]], cut: Cut, weights: Weights
) -> Extracted:
    """LoRA whose sum with the base `nets` is nearest to `tuned(net)` (its parameters by name), layer by layer.

    `weights` lends manifest and tokens. Layers that were not changed get none.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(dict)
    kept, left_out = Kept({}, {}, {}), {}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # XL has 700 matrices of a thousand rows and more
    for net, module in nets.items():
        state = tuned(net)
        matrices = {f"{name}.weight": name for name in layers(module)}
        for key, base in module.named_parameters():
            if key not in state:
                continue
            change = state[key].to(device).double() - base.detach().to(device).double()
            if not change.any():
                continue
            if key not in matrices:
                left_out[f"{net}.{key}"] = change.square().sum().item()
                continue
            svd = torch.linalg.svd(change.flatten(1), full_matrices=False)
            solid = int((svd[1] > svd[1][0] * torch.finfo(torch.float32).eps).sum())  # the rest is rounding of fp32
            count, name = min(cut.of(svd[1]), max(1, solid)), f"{net}.{matrices[key]}"
            down, up = (part.cpu() for part in factors(svd, count))
            kept.before[name] = change.square().sum().item()
            kept.after[name] = svd[1][:count].square().sum().item()
            kept.ranks[name] = count
            ones = [1] * (change.dim() - 2)
            found[net][matrices[key]] = {
                DOWN: down.reshape(count, *change.shape[1:]),
                UP: up.reshape(-1, count, *ones),
                ALPHA: torch.tensor(float(count)),
            }
    return Extracted(with_layers(weights, found), kept, left_out)
