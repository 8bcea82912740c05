"""The adapter in kohya's keys, which ComfyUI, A1111, Forge and diffusers' own loader read.

    unet.down_blocks.0.resnets.0.conv1.lora_A.weight  ->  lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight
                                      .lora_B.weight                                             .lora_up.weight
                                      .lora_magnitude_vector                                     .dora_scale
    (LoraConfig's alpha, of this very module)                                                    .alpha

Diffusers' `convert_state_dict_to_kohya` is not used: it writes the rank for every alpha, mixes up UNet and text
encoders in one dictionary, loses the first text encoder's "text_model" and leaves DoRA's magnitudes unnamed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import artifact
from trainer.artifact import HASH_TO_COME, Manifest, save_tensors

if TYPE_CHECKING:
    import torch

LoraConfigs = dict[str, dict[str, Any]]  # net -> LoraConfig as plain values, as in Manifest.nets

PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
# LyCORIS' names, which peft's LoKr shares
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
PARTS |= {part: part for part in LOKR_PARTS}
# SDXL's added conditioning has only its name in the original UNet: the spelling of diffusers cannot be read back.
RESPELLED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
# Width of the text that cross-attention reads -> how kohya and ModelSpec call the base model.
BASES = {
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}

# kohya's field of the header -> our setting of the same meaning
TRAINED_WITH = {
    "ss_seed": "seed",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_lr_scheduler": "lr_schedule",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_total_batch_size": "train_batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_mixed_precision": "mixed_precision",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_caption_dropout_rate": "caption_dropout",
}


def to_kohya(state: dict[str, torch.Tensor], nets: LoraConfigs, two_text_encoders: bool) -> dict[str, torch.Tensor]:
    """`state` (keys as in adapter.safetensors) in kohya's keys, with each module's true alpha (a scalar, fp32).

    `two_text_encoders`: SDXL's files say te1 and te2 where those of SD 1.x and 2.x say te. The tensors are shared with
    `state` but for DoRA's magnitudes, which become [out, 1] or [out, 1, 1, 1]. (LyCORIS scales W + dW to these norms,
    as peft does; ComfyUI and Forge divide by the norm of W alone, so that DoRA is drawn slightly off there.)

    Raises ValueError for a key that kohya's format has no place for: nothing is left out silently. KeyError for a net
    that `nets` lacks.
    """
    import torch

    converted = {}
    for key, tensor in state.items():
        net, module, part = _split(key)
        name = _kohya_name(net, module, two_text_encoders)
        if part == "lora_A.weight":
            alpha = alpha_of(module, tensor.shape[0], nets[net])
            converted[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        elif part == "lora_magnitude_vector":
            up = state[f"{net}.{module}.lora_B.weight"]
            tensor = tensor.reshape(-1, *[1] * (up.dim() - 1))
        elif part in LOKR_PARTS:
            scale = nets[net]["alpha"] / nets[net]["r"]
            converted[f"{name}.alpha"] = torch.tensor(float(nets[net]["alpha"]))
            # LyCORIS takes the scale of two whole factors to be 1, whatever alpha says
            whole = all(f"{net}.{module}.{one}" in state for one in ("lokr_w1", "lokr_w2"))
            tensor = tensor * scale if whole and part == "lokr_w1" else tensor
        converted[f"{name}.{PARTS[part]}"] = tensor
    return converted


def header(state: dict[str, torch.Tensor], manifest: Manifest, prediction_type: str | None = None) -> dict[str, str]:
    """What kohya's tools and model managers read from the file's header: trigger, base, rank, alpha, training.

    ModelSpec's fields (https://github.com/Stability-AI/ModelSpec) and kohya's ss_*. The base is named where the width
    of the cross-attention tells it, and left out for others (the toybox's). `prediction_type`: diffusers' name.
    """
    described = modelspec(manifest, prediction_type) | _training(manifest)
    config = artifact.adapter_settings(manifest.nets)
    rank, alpha = str(config["lora_rank"]), str(config["lora_alpha"])
    described |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    if config["adapter_type"] == "lokr":
        described["ss_network_module"] = "lycoris.kohya"
        described["ss_network_args"] = json.dumps({"algo": "lokr", "factor": str(config["lokr_factor"])})
    elif any(tensor.dim() == 4 for tensor in state.values()):
        described["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    widths = {tensor.shape[1] for key, tensor in state.items() if key.endswith("attn2.to_k.lora_A.weight")}
    if len(widths) == 1:
        described |= architecture(widths.pop(), "lora", prediction_type)
    return described


def architecture(width: int, kind: str, prediction_type: str | None = None) -> dict[str, str]:
    """Header fields that name the base model of weights of a kind ("lora", "textual-inversion") by the width of the
    text that its cross-attention reads; none for widths of no published Stable Diffusion."""
    if width not in BASES:
        return {}
    version, name = BASES[width]
    if version == "sd_v2":
        name += "-768-v" if prediction_type == "v_prediction" else "-512"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "modelspec.architecture": f"{name}/{kind}",
    }


def modelspec(manifest: Manifest, prediction_type: str | None = None) -> dict[str, str]:
    """ModelSpec 1.0.0's fields that are the same for every file of one training; the hash is filled in on writing."""
    words = [one.trigger_word for one in manifest.words]
    described = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": manifest.title,
        "modelspec.trigger_phrase": ", ".join(words),
        "modelspec.usage_hint": f"Trigger word{'s' if len(words) > 1 else ''}: {', '.join(words)}",
        "modelspec.date": manifest.created.isoformat(),
        "modelspec.hash_sha256": HASH_TO_COME,
        "sshs_model_hash": HASH_TO_COME,
        "base_model": manifest.base_model,
        "trigger_word": manifest.trigger_word,
    }
    if manifest.base_license:
        described["modelspec.license"] = manifest.base_license
    if resolution := manifest.settings.get("resolution"):
        described["modelspec.resolution"] = f"{resolution}x{resolution}"
    if prediction_type in ("epsilon", "v_prediction"):
        described["modelspec.prediction_type"] = prediction_type.partition("_")[0]
    return described


def _training(manifest: Manifest) -> dict[str, str]:
    """kohya's fields about the training: those of its own that our settings have, and the triggers as the tags."""
    described = {key: manifest.settings.get(name) for key, name in TRAINED_WITH.items()}
    if resolution := manifest.settings.get("resolution"):
        described["ss_resolution"] = (resolution, resolution)
    return {key: str(value) for key, value in described.items() if value is not None} | {
        "ss_output_name": manifest.title,
        "ss_sd_model_name": manifest.base_model,
        "ss_steps": str(manifest.step),
        "ss_training_comment": f"method {manifest.method}",
        "ss_tag_frequency": json.dumps({manifest.method: {one.trigger_word: 1 for one in manifest.words}}),
    }


def save(
    path: Path,
    state: dict[str, torch.Tensor],
    manifest: Manifest,
    two_text_encoders: bool,
    prediction_type: str | None = None,
) -> None:
    """Write `state` (keys as in adapter.safetensors) to a .safetensors file in kohya's keys, whole."""
    described = header(state, manifest, prediction_type)
    save_tensors(path, to_kohya(state, manifest.nets, two_text_encoders), described)


def _split(key: str) -> tuple[str, str, str]:
    """Net, path of the module in it, and what the tensor is to that module."""
    net, _, rest = key.partition(".")
    for part in PARTS:
        module = rest.removesuffix(f".{part}")
        if module != rest and net in ("unet", "text_encoder", "text_encoder_2"):
            return net, module, part
    raise ValueError(f"kohya's format has no place for {key}")


def _kohya_name(net: str, module: str, two_text_encoders: bool) -> str:
    if net == "unet":
        return "lora_unet_" + RESPELLED.get(module, module).replace(".", "_")
    if not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"  # transformers flattens CLIPTextModel, kohya's keys come from before
    if not two_text_encoders and net == "text_encoder_2":
        raise ValueError(f"{net} is adapted, but the base model is said to have one text encoder")
    prefix = "lora_te_" if not two_text_encoders else "lora_te1_" if net == "text_encoder" else "lora_te2_"
    return prefix + module.replace(".", "_")


def alpha_of(module: str, rank: int, config: dict[str, Any]) -> float:
    """The alpha with which alpha / rank is the scale that peft multiplies this module's matrices by."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
    # Rank-stabilised LoRA divides by the root of the rank, a thing that kohya's format knows nothing of.
    return float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
