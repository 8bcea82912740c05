"""LoRA in the keys of kohya, diffusers and peft -> peft's keys by net, with each module's true rank and alpha."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from preprocessing.errors import UserError
from trainer import artifact
from trainer.families.base import DENOISER, Drawable

DOWN, UP, MAGNITUDE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"
MIDDLE = "lora_mid.weight"  # LyCORIS' third factor of a convolution
KOHYA_PARTS = {"lora_down.weight": DOWN, "lora_up.weight": UP, "dora_scale": MAGNITUDE, "alpha": ALPHA, MIDDLE: MIDDLE}
# What a key of another kind of adapter ends in, and what that kind is called.
OTHER_KINDS = {
    r"hada_[wt]\d": "LoHa (LyCORIS)",
    r"lokr_[wt]\d": "LoKr (LyCORIS)",
    r"oft_(?:blocks|diag)|oft_R\b": "OFT",
    r"boft_": "BOFT",
    r"on_input|ia3_l": "(IA)^3",
    r"\.[ab][12]\.weight": "GLoRA (LyCORIS)",
    r"\.diff(?:_b)?$|\.w_norm$|\.b_norm$": "a difference of full weights (LyCORIS full or norm)",
    r"vera_|hada_|glora_": "another LyCORIS or peft adapter",
}
KOHYA_NETS = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
}
# How kohya's SDXL trainer, which keeps the original UNet's names, calls what lies inside and around the blocks.
ORIGINAL_BLOCKS = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
ORIGINAL_ENDS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "downsamplers_0_op": "downsamplers_0_conv",
}
ORIGINAL_NAMES = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
DOTTED_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector|alpha)")
PEFTS_OWN = re.compile(r"\.lora_[AB]\.")
# LoRA as parts of the attention processors, as diffusers once kept it; its converter leaves added keys out
OLD_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(down|up)\.weight")
OLD_TEXT = re.compile(r"\.(to_[qkv]|to_out)_lora\.|\.lora_linear_layer\.")


@dataclass(frozen=True)
class Adapter:
    """LoRA weights with keys as in adapter.safetensors, and peft's LoraConfig of each net as plain values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nets: dict[str, dict[str, Any]] = field(default_factory=dict)


Found = dict[tuple[str, str], dict[str, Tensor]]  # (net, module) -> part -> tensor


def read_adapter(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], peft_config: Mapping[str, Any], family: Drawable
) -> Adapter:
    """`tensors` in whichever keys, for the nets of `family`. UserError names the keys that have no place there.

    Where no alpha is stored, `header` (diffusers') or `peft_config` (adapter_config.json) may tell it; else it is the
    rank, which scales by 1.
    """
    _refuse_other_kinds(tensors)
    tensors = family.own_keys(tensors)
    kohya = any(key.startswith(tuple(KOHYA_NETS)) for key in tensors)
    found: Found = defaultdict(dict)
    lost = []
    for net, module, part, key, tensor in (_kohya if kohya else _dotted)(tensors, family):
        if module is None:
            lost.append(key)
        else:
            found[net, module][part] = tensor
    lost += [f"{net}.{module}" for (net, module), parts in found.items() if not {DOWN, UP} <= parts.keys()]
    if lost:
        named = ", ".join(f"{key}{_nearest(key, kohya, family)}" for key in lost[:3])
        named += f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(f"The base model has no place for these keys of the weights: {named}; use the base they fit.")
    for parts in found.values():
        if MIDDLE in parts:
            parts[DOWN] = _without_middle(parts[DOWN], parts.pop(MIDDLE))
    denoisers = [net.name for net in family.nets if net.part == DENOISER]
    configs = _stored_configs(header, peft_config, denoisers)
    state, nets = {}, {}
    for net in sorted({net for net, _ in found}):
        live = layers(family.module(net))
        own = {module: parts for (other, module), parts in found.items() if other == net}
        nets[net] = lora_config_of(own, configs.get(net) or {})
        for module, parts in own.items():
            for part in parts.keys() - {ALPHA}:
                state[f"{net}.{module}.{part}"] = _shaped(parts[part], part, live[module])
    return Adapter(state, nets)


def _refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    """UserError that says what the file is where it holds an adapter that is no LoRA."""
    for pattern, kind in OTHER_KINDS.items():
        for key in tensors:
            if re.search(pattern, key):
                raise UserError(
                    f"The weights are {kind}, which is not read (at {key}): LoRA and DoRA are, so convert them to LoRA."
                )


def _nearest(key: str, kohya: bool, family: Drawable) -> str:
    """The name that the model has and that is most like a key's, as the middle of a sentence; nothing where none is."""
    stem, rest = key, ""
    if kohya:
        stem, _, rest = key.partition(".")
        known = {
            prefix + name.replace(".", "_")
            for prefix, net in KOHYA_NETS.items()
            for name in (layers(family.module(net)) if net in {one.name for one in family.nets} else ())
            if stem.startswith(prefix)
        }
    else:
        known = {f"{net.name}.{name}" for net in family.nets for name in layers(family.module(net.name))}
    near = difflib.get_close_matches(stem, sorted(known), n=1)
    return f" (nearest: {near[0]}{'.' if rest else ''}{rest})" if near else ""


def _without_middle(down: Tensor, middle: Tensor) -> Tensor:
    """LyCORIS' Tucker form of a convolution, up [o,r,1,1] * middle [r,r,k,k] * down [r,i,1,1], as two factors: the
    middle one goes into down [r,i,k,k], whose product with up is the same."""
    return torch.einsum("rskl,si->rikl", middle.float(), down.flatten(1).float())


def _modules(family: Drawable) -> dict[str, dict[str, str]]:
    """net -> any spelling of a module (dots as they are, and as "_"; text encoders with "text_model" too) -> name."""
    spellings: dict[str, dict[str, str]] = {}
    for net in family.nets:
        spellings[net.name] = names = {}
        for name in layers(family.module(net.name)):
            plain = name.removeprefix("text_model.")
            for spelt in (name, plain, f"text_model.{plain}"):
                names[spelt] = names[spelt.replace(".", "_")] = name
    return spellings


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """A net's own layers by name, also while peft's are around them: weights are read before those in use go."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not PEFTS_OWN.search(name)
    }


Placed = tuple[str, str | None, str, str, Tensor]  # net, module (None: there is none), part, key, tensor


def _kohya(tensors: Mapping[str, Tensor], family: Drawable) -> Iterator[Placed]:
    spellings = _modules(family)
    for key, (name, tensor) in _in_diffusers_blocks(tensors, family).items():
        stem, _, ending = name.partition(".")
        prefix = next((prefix for prefix in KOHYA_NETS if stem.startswith(prefix)), "")
        net, flat = KOHYA_NETS.get(prefix, ""), stem.removeprefix(prefix)
        flat = ORIGINAL_NAMES.get(flat, flat)
        for original, ours in ORIGINAL_BLOCKS.items():
            if flat.startswith(f"{original}_"):
                flat = ours + flat.removeprefix(original)
        for original, ours in ORIGINAL_ENDS.items():
            if flat.endswith(f"_{original}"):
                flat = flat.removesuffix(original) + ours
        part = KOHYA_PARTS.get(ending)
        yield net, spellings.get(net, {}).get(flat) if part else None, part or "", key, tensor


def _in_diffusers_blocks(tensors: Mapping[str, Tensor], family: Drawable) -> dict[str, tuple[str, Tensor]]:
    """key -> its name with diffusers' numbers of blocks, and the tensor."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    renamed = {key: key for key in tensors}
    has_unet = any(net.name == "unet" for net in family.nets)
    numbered = [
        key for key in tensors if has_unet and re.match(r"lora_unet_(?:input_blocks|middle_block|output_blocks)_", key)
    ]
    for key in numbered:
        try:
            # one at a time, so that a key that has no such place does not hide the others
            (renamed[key],) = _maybe_map_sgm_blocks_to_diffusers({key: key}, family.module("unet").config)
        except (ValueError, IndexError):
            continue  # keeps its name, which no module has
    return {key: (name, tensors[key]) for key, name in renamed.items()}


def _dotted(tensors: Mapping[str, Tensor], family: Drawable) -> Iterator[Placed]:
    spellings = _modules(family)
    denoisers = [net.name for net in family.nets if net.part == DENOISER]
    for key, tensor in tensors.items():
        rest = key.removeprefix("base_model.model.")
        net, _, inner = rest.partition(".")
        # a key that names no net (cog-sdxl's, peft's, old attention processors') is the denoiser's that has the module
        nets, inner = ([net], inner) if net in spellings else (denoisers, rest)
        matches = {name: DOTTED_PART.fullmatch(_peft_spelling(name, inner)) for name in nets}
        found = [(name, match) for name, match in matches.items() if match and match[1] in spellings[name]]
        if found:
            (name, match), *_ = found
            yield name, spellings[name][match[1]], match[2], key, tensor
        else:
            yield nets[0], None, "", key, tensor


def _peft_spelling(net: str, rest: str) -> str:
    """diffusers' older ways to name the two matrices -> peft's."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    if match := OLD_PROCESSOR.fullmatch(rest):
        attention, projection, matrix = match.groups()
        projection = "to_out.0" if projection == "to_out" else projection
        return f"{attention}.{projection}.{'lora_A' if matrix == 'down' else 'lora_B'}.weight"
    convert = convert_unet_state_dict_to_peft
    if net != "unet" and OLD_TEXT.search(rest):
        # the function tells the older of the two text spellings by a key that not every module has
        convert = convert_state_dict_to_peft
        if "_lora." in rest:
            from diffusers.utils.state_dict_utils import StateDictType

            return next(iter(convert({rest: rest}, original_type=StateDictType.DIFFUSERS_OLD)))
    (name,) = convert({rest: rest})
    name = name.replace(".default.", ".")  # peft's name of the adapter, which its own files leave out
    return name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name


def _stored_configs(
    header: Mapping[str, str], peft_config: Mapping[str, Any], denoisers: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What a file says of its own adapters: net -> values of a LoraConfig. peft's own names no net: a denoiser's."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    stored: dict[str, dict[str, Any]] = {net: dict(peft_config) for net in denoisers if peft_config}
    try:
        packed = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError("The header of the weights is damaged: copy them again.") from error
    for key, value in packed.items() if isinstance(packed, dict) else ():
        net, _, name = key.partition(".")
        stored.setdefault(net, {})[name] = value
    return stored


def lora_config_of(modules: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The LoraConfig of one net: the commonest rank and alpha, and the others by module."""
    from trainer.kohya import alpha_of

    ranks = {module: parts[DOWN].shape[0] for module, parts in modules.items()}
    alphas = {}
    for module, parts in modules.items():
        if ALPHA in parts:
            alphas[module] = float(parts[ALPHA].item())
        else:
            alphas[module] = alpha_of(module, ranks[module], {"lora_alpha": ranks[module]} | dict(stored))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
        alpha_pattern={f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
        target_modules=sorted(modules),
        use_dora=any(MAGNITUDE in parts for parts in modules.values()),
    )
    return artifact.lora_config_dict(config)


def _shaped(tensor: Tensor, part: str, module: nn.Module) -> Tensor:
    """As peft has it for this module: programs differ in whether a 1x1 convolution is a matrix."""
    if part == MAGNITUDE:
        return tensor.reshape(1, -1, 1, 1) if isinstance(module, nn.Conv2d) else tensor.reshape(-1)
    if isinstance(module, nn.Conv2d) and tensor.dim() == 2:
        return tensor[:, :, None, None]
    if isinstance(module, nn.Linear) and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor
