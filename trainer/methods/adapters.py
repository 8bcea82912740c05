"""Adapters on any of a family's nets, by peft: LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024,
arXiv:2402.09353), LoKr (Yeh et al. 2023, arXiv:2309.14859) and OFT (Qiu et al. 2023, arXiv:2306.07280).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import recurse_remove_peft_layers
from peft import (
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import artifact
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Family, Net

ADAPTER = "default"
CONFIGS: dict[str, type[PeftConfig]] = {"lora": LoraConfig, "lokr": LoKrConfig, "oft": OFTConfig}
PARTS = re.compile(r"\.(?:lora|lokr|oft)_")  # between a layer's name and that of its adapter's tensor


def adapter_config(settings: JobSettings, targets: tuple[str, ...]) -> PeftConfig:
    """peft's configuration of one net's adapter. Each begins as no change of the net.

    LoKr adds alpha / r * kron(w1, w2) to a weight, w1 of at most `lokr_factor` rows and columns, w2 a product of rank
    `lora_rank` where that is smaller. OFT multiplies what a layer reads by a block-diagonal rotation, each block the
    Cayley transform (I - Q)(I + Q)^-1 of a skew-symmetric Q of `lora_rank` rows, exactly.
    """
    rank = settings.lora_rank
    alpha = rank if settings.lora_alpha is None else settings.lora_alpha
    if settings.adapter_type == "lokr":
        factor, chosen = settings.lokr_factor, list(targets)
        return LoKrConfig(r=rank, alpha=alpha, target_modules=chosen, decompose_factor=factor, init_weights="lycoris")
    if settings.adapter_type == "oft":
        return OFTConfig(oft_block_size=rank, target_modules=list(targets), use_cayley_neumann=False)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_dora=settings.use_dora,
        init_lora_weights="gaussian",
    )


def inject(module: nn.Module, config: PeftConfig, adapter: str = ADAPTER) -> list[nn.Parameter]:
    """Put an adapter into a net in place; its parameters, in fp32. UserError for a layer that it cannot adapt."""
    before = {id(p) for p in module.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # the nearest that the layer's width allows
        inject_adapter_in_model(config, module, adapter)
    if isinstance(config, OFTConfig) and any(map(_has_overlaps, tuner_layers(module))):
        raise UserError(
            "adapter_type oft: peft rotates no convolution's overlapping patches: use lora_targets attention."
        )
    cast_training_params(module, torch.float32)
    return [p for p in module.parameters() if p.requires_grad and id(p) not in before]


def _has_overlaps(layer: BaseTunerLayer) -> bool:
    """Whether an adapted layer is a convolution of more than a pixel: peft folds its rotated patches into their sum."""
    base = layer.get_base_layer()
    return isinstance(base, nn.Conv2d) and base.kernel_size != (1, 1)


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
    """The nets' adapter weights in fp32 with diffusers' keys."""
    return {
        f"{name}.{key}": value.detach().float().cpu()
        for name in nets
        for key, value in get_peft_model_state_dict(family.module(name), adapter_name=ADAPTER).items()
    }


def saved_configs(folder: Path, family: Family) -> dict[str, PeftConfig]:
    """peft's configuration of each net that an archive has an adapter for; UserError where it is not one."""
    stored = artifact.read_manifest(folder).nets
    unknown = sorted(set(stored) - {net.name for net in family.nets})
    if unknown:
        raise UserError(
            f"The weights are for {unknown[0]}, which the base model has not: use the base they were made on."
        )
    try:
        return {name: CONFIGS[artifact.adapter_type({name: config})](**config) for name, config in stored.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{artifact.MANIFEST} of the weights: nets: {error}; train again or copy it again.") from error


def put_in(
    module: nn.Module, name: str, config: PeftConfig, tensors: dict[str, Tensor], adapter: str = ADAPTER
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
    found = {PARTS.split(key.removeprefix(f"{net.name}."))[0] for key in tensors if key.startswith(f"{net.name}.")}
    if odd := sorted(wanted ^ found):
        raise UserError(
            f"lora_targets {preset} does not agree with init_adapter (at {odd[0]} of the {net.name}): leave it out."
        )


def load_lora(folder: Path, family: Family, configs: dict[str, PeftConfig], adapter: str) -> None:
    """Put an archive's adapters into the family's nets; raises UserError where the weights do not fit them."""
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
    """Scale what the layers add; 1 is as trained, 0 the base model, for OFT no other."""
    for layer in tuner_layers(module):
        if hasattr(layer, "scaling"):
            layer.set_scale(adapter, strength)
        if hasattr(layer, "set_scale"):
            layer.enable_adapters(strength != 0)  # DoRA's magnitudes and OFT's rotations know no scale
