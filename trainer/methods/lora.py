"""LoRA, DoRA, LoKr or OFT on the denoiser, and on the text encoders if asked; the trigger stays an ordinary word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Drawable, Family
from trainer.methods import adapters
from trainer.methods.base import Method, ParameterGroup, scheduled

WEIGHTS, TEXT_WEIGHTS = "weights", "text_weights"
UP = "_up"  # behind a group's name: LoRA's matrices B, where they have a learning rate of their own
ATTENTION = "attention"  # the layers of a net that the weights that training starts from leave alone


class Lora(Method):
    """Adapters on weights; see trainer.methods.adapters."""

    name: ClassVar[str] = "lora"

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self.needs_text_grad = self.changes_text = self.changes_null = settings.train_text_encoder
        self.has_strength = settings.adapter_type != "oft"
        self._family: Drawable | None = None
        self._nets: list[str] = []
        self._matrices: list[Tensor] = []
        self._start: Path | None = None

    def begin_from(self, folder: Path) -> None:
        self._start = folder

    def attach(self, family: Family) -> list[ParameterGroup]:
        self._family, self._nets = family, adapters.adapted_nets(family, self.settings)
        return self._attach_weights(family)

    def _attach_weights(self, family: Family) -> list[ParameterGroup]:
        found: dict[str, list] = {WEIGHTS: [], TEXT_WEIGHTS: []}
        configs, tensors = {}, {}
        if self._start is not None and (configs := adapters.saved_configs(self._start, family)):
            tensors, _ = artifact.load_tensors(self._start / artifact.ADAPTER)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            for net in (net for net in family.nets if net.name in self._nets):
                group = found[WEIGHTS if net.part == DENOISER else TEXT_WEIGHTS]
                module, preset = family.module(net.name), self.settings.lora_targets
                if net.name not in configs:
                    group += adapters.inject(
                        module, adapters.adapter_config(self.settings, net.targets[preset or ATTENTION])
                    )
                    continue
                if preset is not None:
                    adapters.check_layers(net, module, tensors, preset)
                group += adapters.put_in(module, net.name, configs[net.name], tensors)
        self._matrices = [p for group in found.values() for p in group if p.ndim > 1]
        groups = [weights_group(self.settings, name, group) for name, group in found.items() if group]
        return lora_groups(self.settings, groups, [family.module(name) for name in self._nets])

    def schedule(self, progress: float) -> dict[str, float]:
        factor = scheduled(self.settings, progress)
        return dict.fromkeys((WEIGHTS, WEIGHTS + UP, TEXT_WEIGHTS, TEXT_WEIGHTS + UP), factor)

    def penalty(self) -> Tensor | float:
        if not self.settings.lora_l1_penalty:
            return 0.0
        total = sum(p.abs().sum() for p in self._matrices) / sum(p.numel() for p in self._matrices)
        return self.settings.lora_l1_penalty * total

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        layers = [layer for name in self._nets for layer in adapters.tuner_layers(family.module(name))]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def nets(self) -> dict[str, dict[str, Any]]:
        return adapters.net_configs(self._family, self._nets)

    def save(self, folder: Path, manifest: Manifest) -> None:
        tensors = adapters.lora_state(self._family, self._nets)
        artifact.save_tensors(folder / artifact.ADAPTER, tensors, artifact.adapter_header(tensors, manifest))

    def load(self, folder: Path, family: Drawable) -> None:
        configs = adapters.saved_configs(folder, family)
        self._family, self._nets = family, list(configs)  # before anything is put in, so that it can be taken out
        adapters.load_lora(folder, family, configs, self.adapter)

    def detach(self, family: Drawable) -> None:
        for name in self._nets:
            adapters.remove(family.module(name), self.adapter)
        self._family, self._nets, self._matrices = None, [], []

    def merge(self, family: Family) -> str:
        for name in self._nets:
            adapters.merge(family.module(name))
        self._family, self._nets, self._matrices = None, [], []
        return self.settings.trigger_word

    def set_strength(self, family: Drawable, strength: float) -> None:
        if not self.has_strength and strength not in (0, 1):
            raise UserError("lora_scale cannot scale rotations (adapter_type oft): use 1, or 0 for the base model.")
        for name in self._nets:
            adapters.set_scale(family.module(name), strength, self.adapter)


def weights_group(settings: JobSettings, name: str, parameters: list) -> ParameterGroup:
    """The group of LoRA or full weights; the text encoders' have a rate of their own where one is set."""
    rate = settings.learning_rate
    if name == TEXT_WEIGHTS and settings.text_encoder_lr is not None:
        rate = settings.text_encoder_lr
    return ParameterGroup(name, parameters, settings.optimizer, rate, settings.weight_decay)


def lora_groups(settings: JobSettings, groups: list[ParameterGroup], modules: list[nn.Module]) -> list[ParameterGroup]:
    """The groups with the matrices B of LoRA, which begin at zero, in groups of their own, whose learning rate is
    lora_plus_ratio times that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354: eta_B = lambda eta_A). What else there
    is, DoRA's magnitudes, moves with A. Ratio 1 leaves the groups as they are.
    """
    ratio, parted = settings.lora_plus_ratio, []
    if ratio == 1:
        return groups
    ups = {id(p) for module in modules for name, p in module.named_parameters() if ".lora_B." in name}
    for group in groups:
        slow = [p for p in group.parameters if id(p) not in ups]
        fast = [p for p in group.parameters if id(p) in ups]
        rate = group.learning_rate * ratio
        parted += [replace(group, parameters=slow)]
        parted += [replace(group, name=group.name + UP, parameters=fast, learning_rate=rate)]
    return parted
