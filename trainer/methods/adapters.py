"""LoRA and DoRA on any of a family's nets, by peft (Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, 2402.09353)."""

from __future__ import annotations

import warnings
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
from trainer.families.base import DENOISER, Family, Net

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


def inject(module: nn.Module, config: PeftConfig, adapter: str = ADAPTER) -> list[nn.Parameter]:
    """Put an adapter into a net in place; its parameters, in fp32."""
    before = {id(p) for p in module.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        inject_adapter_in_model(config, module, adapter)
    cast_training_params(module, torch.float32)
    return [p for p in module.parameters() if p.requires_grad and id(p) not in before]


def remove(module: nn.Module, adapter: str = ADAPTER) -> None:
    """Take an adapter out, and where it is the only one peft's layers too; the net's own weights were never touched."""
    others = [name for name in getattr(module, "peft_config", {}) if name != adapter]
    if others:
        for layer in tuner_layers(module):
            layer.set_adapter(others[:1], inference_mode=True)
            layer.delete_adapter(adapter)
        module.peft_config.pop(adapter, None)
        return
    recurse_remove_peft_layers(module)
    if hasattr(module, "peft_config"):
        del module.peft_config
    module.requires_grad_(False)


def merge(module: nn.Module) -> None:
    """Add every adapter of a net to the weights it is on, for good."""
    for layer in tuner_layers(module):
        layer.merge()
    remove(module)


def tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def adapted_nets(family: Family, settings: JobSettings) -> list[str]:
    """Names of the nets that are adapted; a net without targets never is."""
    return [net.name for net in family.nets if net.part == DENOISER or (settings.train_text_encoder and net.targets)]


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


def saved_configs(folder: Path, family: Family) -> dict[str, LoraConfig]:
    """peft's configuration of each net that an archive has LoRA weights for; UserError where it is not one."""
    stored = artifact.read_manifest(folder).nets
    unknown = sorted(set(stored) - {net.name for net in family.nets})
    if unknown:
        raise UserError(
            f"The weights are for {unknown[0]}, which the base model has not: use the base they were made on."
        )
    try:
        return {name: LoraConfig(**config) for name, config in stored.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{artifact.MANIFEST} of the weights: nets: {error}; train again or copy it again.") from error


def put_in(
    module: nn.Module, name: str, config: LoraConfig, tensors: dict[str, Tensor], adapter: str = ADAPTER
) -> list[nn.Parameter]:
    """Put an adapter with an archive's weights into the net called `name`; its parameters. UserError at a misfit."""
    parameters = inject(module, config, adapter)
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    check_fit(name, state, get_peft_model_state_dict(module, adapter_name=adapter))
    set_peft_model_state_dict(module, state, adapter_name=adapter)
    return parameters


def check_layers(net: Net, module: nn.Module, tensors: dict[str, Tensor], preset: str) -> None:
    """Raise UserError unless an archive adapts just those layers of a net that a preset of targets names."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    wanted = {name for name in layers if any(f".{name}".endswith(f".{end}") for end in net.targets[preset])}
    found = {
        key.removeprefix(f"{net.name}.").partition(".lora_")[0] for key in tensors if key.startswith(f"{net.name}.")
    }
    if odd := sorted(wanted ^ found):
        raise UserError(
            f"lora_targets {preset} does not agree with init_adapter (at {odd[0]} of the {net.name}): leave it out."
        )


def load_lora(folder: Path, family: Family, configs: dict[str, LoraConfig], adapter: str) -> None:
    """Put an archive's LoRA weights into the family's nets; raises UserError where the weights do not fit them."""
    tensors, _ = artifact.load_tensors(folder / artifact.ADAPTER)
    for name, config in configs.items():
        put_in(family.module(name), name, config, tensors, adapter)
        family.module(name).requires_grad_(False)


def check_fit(net: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise UserError unless `found` has the keys and shapes of `wanted`."""
    shapes = [{key: value.shape for key, value in state.items()} for state in (found, wanted)]
    odd = sorted(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
    if odd:
        raise UserError(f"The weights do not fit the base model's {net} (at {odd[0]}): use the base they were made on.")


def set_scale(module: nn.Module, strength: float, adapter: str) -> None:
    """Scale what the LoRA layers add; 1 is as trained, 0 the base model."""
    for layer in tuner_layers(module):
        if hasattr(layer, "set_scale"):
            layer.set_scale(adapter, strength)
            layer.enable_adapters(strength != 0)  # DoRA's magnitudes know no scale
