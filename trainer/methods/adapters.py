"""LoRA and DoRA on any of a family's nets, by peft (Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, 2402.09353)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import artifact
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Family

ADAPTER = "default"


def lora_config(settings: JobSettings, targets: tuple[str, ...]) -> LoraConfig:
    """peft's configuration of one net's adapter."""
    rank = settings.lora_rank
    return LoraConfig(
        r=rank,
        lora_alpha=rank if settings.lora_alpha is None else settings.lora_alpha,
        target_modules=list(targets),
        use_dora=settings.use_dora,
        init_lora_weights="gaussian",
    )


def inject(module: nn.Module, config: PeftConfig) -> list[nn.Parameter]:
    """Put an adapter into a net in place; its parameters, in fp32."""
    before = {id(p) for p in module.parameters()}
    inject_adapter_in_model(config, module, ADAPTER)
    cast_training_params(module, torch.float32)
    return [p for p in module.parameters() if p.requires_grad and id(p) not in before]


def remove(module: nn.Module) -> None:
    """Take every adapter out; the net's own weights were never touched."""
    recurse_remove_peft_layers(module)
    if hasattr(module, "peft_config"):
        del module.peft_config
    module.requires_grad_(False)


def tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def adapted_nets(family: Family, settings: JobSettings) -> list[str]:
    """Names of the nets that LoRA goes into."""
    return [net.name for net in family.nets if net.part == DENOISER or settings.train_text_encoder]


def net_configs(family: Family, nets: list[str]) -> dict[str, dict]:
    """peft's configuration of each adapted net, as the manifest holds it."""
    return {name: artifact.lora_config_dict(family.module(name).peft_config[ADAPTER]) for name in nets}


def lora_state(family: Family, nets: list[str]) -> dict[str, Tensor]:
    """The nets' LoRA weights in fp32 with diffusers' keys."""
    return {
        f"{name}.{key}": value.detach().float().cpu()
        for name in nets
        for key, value in get_peft_model_state_dict(family.module(name), adapter_name=ADAPTER).items()
    }


def load_lora(folder: Path, family: Family) -> list[str]:
    """Put an archive's LoRA weights into the family's nets; the names of the nets.

    Raises UserError where the weights do not fit the nets.
    """
    tensors, _ = artifact.load_tensors(folder / artifact.ADAPTER)
    configs = artifact.read_manifest(folder).nets
    for name, config in configs.items():
        module = family.module(name)
        inject(module, LoraConfig(**config))
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        outcome = set_peft_model_state_dict(module, state, adapter_name=ADAPTER)
        missing = [key for key in outcome.missing_keys if ".lora_" in key]
        if outcome.unexpected_keys or missing:
            key = (outcome.unexpected_keys + missing)[0]
            raise UserError(
                f"The weights do not fit the base model's {name} (at {key}): use the base they were made on."
            )
        module.requires_grad_(False)
    return list(configs)


def set_scale(module: nn.Module, strength: float) -> None:
    """Scale what the LoRA layers add; 1 is as trained."""
    for layer in tuner_layers(module):
        if hasattr(layer, "set_scale"):
            layer.set_scale(ADAPTER, strength)
