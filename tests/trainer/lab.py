"""A base model to try methods on, and to look at before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.families.base import Family
from trainer.methods.base import Method


class Lab:
    """A loaded base model to try methods on."""

    caption = "a photo of TOK on a beach"

    def __init__(self, family: Family):
        self.family = family

    def modules(self) -> dict[str, nn.Module]:
        return {name: self.family.module(name) for name in (*(net.name for net in self.family.nets), "vae")}

    def snapshot(self) -> dict[str, Any]:
        """Everything of the family that a method could change, copied."""
        modules, towers = self.modules(), self.family.text
        named = [(f"{n}.{k}", p) for n, module in modules.items() for k, p in module.named_parameters()]
        return {
            "tensors": {f"{n}.{k}": v.clone() for n, module in modules.items() for k, v in module.state_dict().items()},
            "tree": {n: [(k, type(part)) for k, part in module.named_modules()] for n, module in modules.items()},
            "trainable": [name for name, p in named if p.requires_grad],
            "gradients": [name for name, p in named if p.grad is not None],
            "tokenizers": [len(tower.tokenizer) for tower in towers],
            "vocabulary": [tower.encoder.config.vocab_size for tower in towers],
            "peft": [name for name, module in modules.items() if hasattr(module, "peft_config")],
        }

    def assert_unchanged(self, before: dict[str, Any]) -> None:
        found = self.snapshot()
        assert found["tensors"].keys() == before["tensors"].keys()
        assert [k for k, v in before["tensors"].items() if not torch.equal(found["tensors"][k], v)] == []
        assert {k: v for k, v in found.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}

    def predict(self, caption: str, family: Family | None = None) -> torch.Tensor:
        """The denoiser's answer at one fixed noisy latent."""
        family = family or self.family
        noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
        conditioning = family.encode_text([caption]) | {"time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        return family.predict(noisy, torch.tensor([0.6]), conditioning)

    def train(self, method: Method, steps: int = 3) -> list[nn.Parameter]:
        """A few steps towards a fixed target; returns the parameters."""
        parameters = [p for group in method.attach(self.family) for p in group.parameters]
        optimiser = torch.optim.AdamW(parameters, lr=0.01)
        for _ in range(steps):
            optimiser.zero_grad()
            error = self.predict(method.words([self.caption])[0]) - 1
            (error.square().mean() + method.penalty()).backward()
            optimiser.step()
        return parameters
