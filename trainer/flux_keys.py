"""LoRA of FLUX under the names that its first code gave the layers, which kohya, ComfyUI, XLabs and fal write.

    transformer.transformer_blocks.0.attn.to_q, .to_k, .to_v  <->  lora_unet_double_blocks_0_img_attn_qkv
    transformer.single_transformer_blocks.0.attn.to_q, .to_k, .to_v, .proj_mlp  <->  lora_unet_single_blocks_0_linear1

There q, k and v (and a single block's MLP) are one layer. Written, the matrices of such a layer are put side by side:
down [sum of ranks, in], up block-diagonal. Read, each part keeps the ranks that add something to it: its own of a
block-diagonal `up`, all of any other. diffusers' converter does the same for FLUX.1's own sizes alone, and leaves keys
that it does not know out with a warning.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import kohya
from trainer.artifact import Manifest, save_tensors

PREFIX, OWN_PREFIX = "lora_unet_", "lora_transformer_"  # of the first code's names; of diffusers'
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
DOUBLE = {
    "img_attn_qkv": QKV,
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
SWAPPED = "norm_out.linear"  # scale and shift stand the other way round in diffusers
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}
# XLabs names its matrices after the attention processors that they came with.
XLABS = {
    "qkv_lora1": "img_attn_qkv",
    "qkv_lora2": "txt_attn_qkv",
    "proj_lora1": "img_attn_proj",
    "proj_lora2": "txt_attn_proj",
    "qkv_lora": "linear1",
    "proj_lora": "linear2",
}
XLABS_KEY = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(\w+?)\.(down|up)\.weight")
DOTTED_KEY = re.compile(
    r"((?:double_blocks|single_blocks|img_in|txt_in|time_in|guidance_in|vector_in|final_layer)\b[\w.]*?)"
    r"\.(lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
KOHYA_PART = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
WIDTH = 3072  # of FLUX.1's tokens
DOWN, UP, MAGNITUDE, ALPHA = "lora_down.weight", "lora_up.weight", "dora_scale", "alpha"


def modules_of(stem: str) -> tuple[str, ...]:
    """The transformer's modules that a layer of the first code is, in the order of its rows; () for an unknown one."""
    if stem in OUTSIDE:
        return (OUTSIDE[stem],)
    match = re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(\w+)", stem)
    if not match:
        return ()
    blocks, layers = BLOCKS[match[1]]
    return tuple(f"{blocks}.{match[2]}.{name}" for name in layers.get(match[3], ()))


def stem_of(module: str) -> tuple[str, int]:
    """The first code's layer that holds a module, and the module's place in it. ValueError for one without."""
    for stem, name in OUTSIDE.items():
        if name == module:
            return stem, 0
    for old, (blocks, layers) in BLOCKS.items():
        match = re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", module)
        for layer, names in layers.items():
            if match and match[2] in names:
                return f"{old}_{match[1]}_{layer}", names.index(match[2])
    raise ValueError(f"FLUX's first code has no layer for {module}")


def to_own_names(tensors: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """Keys of the first code's layers -> lora_transformer_ with diffusers' names; all other keys as they are, those of
    layers that this transformer has not among them.
    """
    there = {name for name, _ in transformer.named_modules()}
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stem, part = _layer_of(key)
        modules = modules_of(stem)
        if modules and there.issuperset(modules):
            layers[stem][part] = tensor
        else:
            named[key] = tensor
    for stem, parts in layers.items():
        named |= _taken_apart(stem, parts, transformer)
    return named


def _layer_of(key: str) -> tuple[str, str]:
    """The layer and part (kohya's name) of a key; ("", "") for one that is not of the first code's layers."""
    if key.startswith(PREFIX):
        stem, _, part = key.removeprefix(PREFIX).partition(".")
        return stem, KOHYA_PART.get(part, part)
    plain = key.removeprefix("base_model.model.").removeprefix("diffusion_model.").removeprefix("transformer.")
    if match := XLABS_KEY.fullmatch(plain):
        return f"{match[1]}_blocks_{match[2]}_{XLABS.get(match[3], match[3])}", f"lora_{match[4]}.weight"
    if match := DOTTED_KEY.fullmatch(plain):
        return match[1].replace(".", "_"), KOHYA_PART.get(match[2], match[2])
    return "", ""


def _taken_apart(stem: str, parts: dict[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """One layer's tensors as those of its modules."""
    modules = list(modules_of(stem))
    if UP in parts and len(modules) > 1:
        rows = [_out_features(transformer, module) for module in modules]
        # XLabs' single blocks have q, k and v without the MLP
        while len(rows) > 1 and sum(rows) > parts[UP].shape[0]:
            rows.pop()
        if sum(rows) == parts[UP].shape[0] and DOWN in parts:
            return _split(modules[: len(rows)], parts, rows)
    if modules[0] == SWAPPED and UP in parts:
        parts = parts | {UP: torch.cat(parts[UP].chunk(2)[::-1])}
    return {f"{_own_stem(modules[0])}.{part}": tensor for part, tensor in parts.items()}


def _out_features(transformer: nn.Module, module: str) -> int:
    layer = dict(transformer.named_modules()).get(module)
    return 0 if layer is None else layer.out_features


def _own_stem(module: str) -> str:
    return OWN_PREFIX + module.replace(".", "_")


def _split(modules: list[str], parts: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """The tensors of each module that the layer's matrices reach, without the ranks that add nothing to it."""
    rank, found = parts[UP].shape[1], {}
    ups = parts[UP].split(rows)
    magnitudes = parts[MAGNITUDE].reshape(-1, 1).split(rows) if MAGNITUDE in parts else [None] * len(rows)
    for module, up, magnitude in zip(modules, ups, magnitudes, strict=True):
        used = up.any(dim=0) if parts[UP].any() else torch.ones(rank, dtype=torch.bool)
        if not used.any():
            continue
        stem = _own_stem(module)
        found |= {f"{stem}.{DOWN}": parts[DOWN][used], f"{stem}.{UP}": up[:, used].contiguous()}
        if ALPHA in parts:
            found[f"{stem}.{ALPHA}"] = parts[ALPHA] * used.sum() / rank
        if magnitude is not None:
            found[f"{stem}.{MAGNITUDE}"] = magnitude
    return found


def to_first_names(tensors: Mapping[str, Tensor], manifest: Manifest, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """LoRA (keys as in adapter.safetensors) in kohya's keys; `rows`: the size of every module of the layers that are
    one in the first code. DoRA keeps diffusers' names behind lora_transformer_, since its magnitudes are of whole
    layers, and a layer need not be adapted whole.
    """
    text = {key: tensor for key, tensor in tensors.items() if not key.startswith("transformer.")}
    converted = kohya.to_kohya(text, manifest.nets, two_text_encoders=True)
    layers: dict[str, dict[int, tuple[Tensor, Tensor, float]]] = defaultdict(dict)
    for key in (key for key in tensors if key.startswith("transformer.") and key.endswith(".lora_A.weight")):
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        down, up = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        alpha = kohya.alpha_of(module, down.shape[0], manifest.nets["transformer"])
        magnitude = tensors.get(f"transformer.{module}.lora_magnitude_vector")
        if magnitude is not None:
            stem = _own_stem(module)
            converted |= {f"{stem}.{DOWN}": down, f"{stem}.{UP}": up, f"{stem}.{MAGNITUDE}": magnitude.reshape(-1, 1)}
            converted[f"{stem}.{ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
        else:
            stem, place = stem_of(module)
            up = torch.cat(up.chunk(2)[::-1]) if module == SWAPPED else up
            layers[stem][place] = (down, up, alpha)
    for stem, found in layers.items():
        converted |= _put_together(stem, found, rows)
    return converted


def _put_together(
    stem: str, found: Mapping[int, tuple[Tensor, Tensor, float]], rows: Mapping[str, int]
) -> dict[str, Tensor]:
    """One layer's tensors from those of its modules: down [sum of ranks, in], up block-diagonal."""
    modules = modules_of(stem)
    scales = [alpha / down.shape[0] for down, _, alpha in found.values()]
    same = len(set(scales)) == 1
    # a layer has one alpha: different scales go into the matrices
    ups = [up if same else up * scale for (_, up, _), scale in zip(found.values(), scales, strict=True)]
    if len(modules) == 1:
        up = ups[0]
    else:
        ranks = [down.shape[0] for down, _, _ in found.values()]
        up = torch.zeros(sum(rows[module] for module in modules), sum(ranks), dtype=ups[0].dtype)
        starts = {i: sum(rows[module] for module in modules[:i]) for i in found}
        for place, part, rank, column in zip(found, ups, ranks, _starts(ranks), strict=True):
            up[starts[place] : starts[place] + part.shape[0], column : column + rank] = part
    down = torch.cat([down for down, _, _ in found.values()])
    alpha = torch.tensor((scales[0] if same else 1.0) * down.shape[0], dtype=torch.float32)
    return {f"{PREFIX}{stem}.{DOWN}": down, f"{PREFIX}{stem}.{UP}": up, f"{PREFIX}{stem}.{ALPHA}": alpha}


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def fused_rows(transformer: nn.Module) -> dict[str, int]:
    """Module -> its number of rows, of the modules that are one layer in the first code; peft's may be around them."""
    found = {}
    for name, module in transformer.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and plain.endswith((*QKV, *DOUBLE["txt_attn_qkv"], "proj_mlp")):
            found[plain] = module.out_features
    return found


def architecture(transformer: nn.Module) -> dict[str, str]:
    """Header fields that name FLUX.1 as kohya and ModelSpec do, where the transformer is of its width."""
    config = transformer.config
    if config.num_attention_heads * config.attention_head_dim != WIDTH:
        return {}
    name = "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"
    return {"ss_base_model_version": "flux1", "modelspec.architecture": f"{name}/lora"}


def save(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest, transformer: nn.Module) -> None:
    """Write LoRA (keys as in adapter.safetensors) as a file that ComfyUI, Forge and sd-scripts load, whole."""
    header = kohya.header(dict(tensors), manifest) | architecture(transformer)
    save_tensors(path, to_first_names(tensors, manifest, fused_rows(transformer)), header)
