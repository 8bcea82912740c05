"""Full fine-tuning: every weight of the denoiser, and of the text encoders if asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Drawable, Family, Net
from trainer.methods.adapters import adapted_nets, check_fit
from trainer.methods.base import Method, ParameterGroup, scheduled, trained_state
from trainer.methods.lora import TEXT_WEIGHTS, WEIGHTS, weights_group


class Full(Method):
    """Trains the nets themselves, in fp32; a copy of the base weights on the CPU makes `detach` exact."""

    name: ClassVar[str] = "full"
    trains_base_weights: ClassVar[bool] = True
    has_strength: bool = False

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self.needs_text_grad = self.changes_text = self.changes_null = settings.train_text_encoder
        self._family: Drawable | None = None
        self._originals: dict[str, dict[str, Tensor]] = {}
        self._start: Path | None = None

    def begin_from(self, folder: Path) -> None:
        self._start = folder

    def _take(self, family: Drawable, name: str) -> nn.Module:
        module = family.module(name)
        self._family = family
        self._originals[name] = {key: p.detach().to("cpu", copy=True) for key, p in module.named_parameters()}
        return module

    def attach(self, family: Family) -> list[ParameterGroup]:
        found: dict[str, list] = {WEIGHTS: [], TEXT_WEIGHTS: []}
        names = adapted_nets(family, self.settings)
        for net in (net for net in family.nets if net.name in names):
            trained = trained_parameters(self._take(family, net.name), net)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            found[WEIGHTS if net.part == DENOISER else TEXT_WEIGHTS] += trained.values()
            if self._start is not None:
                _fill(family.module(net.name), net, artifact.load_tensors(self._start / artifact.ADAPTER)[0])
        return [weights_group(self.settings, name, group) for name, group in found.items() if group]

    def schedule(self, progress: float) -> dict[str, float]:
        return dict.fromkeys((WEIGHTS, TEXT_WEIGHTS), scheduled(self.settings, progress))

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        """The base weights are copied in and the trained ones back: for now and then, not for every step."""
        trained = {name: [p.data for p in family.module(name).parameters()] for name in self._originals}
        try:
            for name, original in self._originals.items():
                for key, parameter in family.module(name).named_parameters():
                    parameter.data = original[key].to(parameter.device)
            yield
        finally:
            for name, values in trained.items():
                for parameter, value in zip(family.module(name).parameters(), values, strict=True):
                    parameter.data = value

    def save(self, folder: Path, manifest: Manifest) -> None:
        tensors = {}
        for name in self._originals:
            state = trained_state(self._family.module(name))
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
        artifact.save_tensors(folder / artifact.ADAPTER, tensors, artifact.adapter_header(tensors, manifest))

    def save_diffusers(self, folder: Path, manifest: Manifest) -> None:
        for name in self._originals:
            self._family.module(name).save_pretrained(folder / name)

    def load(self, folder: Path, family: Drawable) -> None:
        tensors, _ = artifact.load_tensors(folder / artifact.ADAPTER)
        names = {key.split(".", 1)[0] for key in tensors}
        for net in (net for net in family.nets if net.name in names):
            _fill(self._take(family, net.name), net, tensors)

    def merge(self, family: Family) -> str:
        self._originals = {}
        return self.settings.trigger_word

    @torch.no_grad()
    def detach(self, family: Drawable) -> None:
        for name, original in self._originals.items():
            module = family.module(name).requires_grad_(False)
            for key, parameter in module.named_parameters():
                parameter.grad = None
                parameter.data = original[key].to(parameter.device)
        self._originals = {}


def trained_parameters(module: nn.Module, net: Net) -> dict[str, nn.Parameter]:
    """The parameters of a net by name, without its statistics of the data."""
    return {name: p for name, p in module.named_parameters() if name not in net.fixed}


@torch.no_grad()
def _fill(module: nn.Module, net: Net, tensors: dict[str, Tensor]) -> None:
    """Give `net`, which is `module`, an archive's weights for it, if there are any; UserError where they do not fit."""
    prefix = f"{net.name}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not state:
        return
    trained = trained_parameters(module, net)
    check_fit(net.name, state, trained)
    for key, parameter in trained.items():
        parameter.copy_(state[key])
