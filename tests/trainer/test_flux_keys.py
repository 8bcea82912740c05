"""LoRA of FLUX in the names of its first code: written, read back, and read as kohya, XLabs and fal write them."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as stock
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from preprocessing.errors import UserError
from tests.trainer.test_golden_names import golden
from trainer import artifact, flux_keys
from trainer.adapter_keys import layers, read_adapter
from trainer.artifact import Manifest
from trainer.families.base import Family
from trainer.families.flux import ATTENTION, MLPS, MODULATIONS
from trainer.foreign import base_of, opened
from trainer.methods.adapters import ADAPTER, inject, remove

GOLDEN = """
lora_te1_text_model_encoder_layers_0_self_attn_q_proj 4x32 32x4 8.0
lora_unet_double_blocks_0_img_attn_proj 4x32 32x4 8.0
lora_unet_double_blocks_0_img_attn_qkv 12x32 96x12 24.0
lora_unet_double_blocks_0_img_mlp_0 4x32 128x4 8.0
lora_unet_double_blocks_0_img_mlp_2 4x128 32x4 8.0
lora_unet_double_blocks_0_img_mod_lin 4x32 192x4 8.0
lora_unet_double_blocks_0_txt_attn_proj 4x32 32x4 8.0
lora_unet_double_blocks_0_txt_attn_qkv 12x32 96x12 24.0
lora_unet_double_blocks_0_txt_mlp_0 4x32 128x4 8.0
lora_unet_double_blocks_0_txt_mlp_2 4x128 32x4 8.0
lora_unet_double_blocks_0_txt_mod_lin 4x32 192x4 8.0
lora_unet_final_layer_linear 4x32 16x4 8.0
lora_unet_img_in 4x16 32x4 8.0
lora_unet_single_blocks_0_linear1 16x32 224x16 32.0
lora_unet_single_blocks_0_linear2 4x160 32x4 8.0
lora_unet_single_blocks_0_modulation_lin 4x32 96x4 8.0
lora_unet_txt_in 4x24 32x4 8.0
"""


@pytest.fixture(scope="module")
def family(tiny_flux: Path, load_family) -> Family:
    return load_family(tiny_flux)


def adapted(family: Family, targets: tuple[str, ...], **changes: Any) -> tuple[dict[str, Tensor], Manifest]:
    """Random LoRA on the transformer, rank 4 and alpha 8, with a manifest; the family is left as it was."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8.0, "target_modules": list(targets)} | changes))
    net = family.module("transformer")
    for parameter in inject(net, config):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    state = get_peft_model_state_dict(net, adapter_name=ADAPTER)
    tensors = {f"transformer.{key}": value.detach().clone() for key, value in state.items()}
    nets = {"transformer": artifact.lora_config_dict(net.peft_config[ADAPTER])}
    remove(net)
    return tensors, manifest_of(nets)


def manifest_of(nets: dict[str, Any]) -> Manifest:
    stored = {"base_model": "x", "base_hash": "", "family": "flux", "method": "lora", "trigger_word": "TOK"}
    return Manifest(**stored, settings={}, dataset_hash="", step=1, created=datetime.now(UTC), nets=nets)


def effects(adapter_tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What is added to each module's weight: alpha / rank * up @ down."""
    found = {}
    for key in (key for key in adapter_tensors if key.endswith(".lora_A.weight")):
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        down, up = adapter_tensors[key], adapter_tensors[key.replace("lora_A", "lora_B")]
        alpha = flux_keys.kohya.alpha_of(module, down.shape[0], config)
        found[module] = alpha / down.shape[0] * up @ down
    return found


def read(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    adapter = read_adapter(tensors, {}, {}, family)
    return effects(adapter.tensors, adapter.nets["transformer"])


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for module, value in expected.items():
        torch.testing.assert_close(found[module], value, rtol=1e-5, atol=1e-5)


def written(tensors: dict[str, Tensor], manifest: Manifest, family: Family) -> dict[str, Tensor]:
    rows = flux_keys.fused_rows(family.module("transformer"))
    return flux_keys.to_first_names(tensors, manifest, rows)


def test_the_keys_that_are_written(family):
    tensors, manifest = adapted(family, (*ATTENTION, *MLPS, *MODULATIONS))
    tensors = {key: value for key, value in tensors.items() if "blocks.1." not in key}
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{text}.lora_A.weight": torch.ones(4, 32), f"{text}.lora_B.weight": torch.ones(32, 4)}
    manifest = manifest.model_copy(update={"nets": manifest.nets | {"text_encoder": manifest.nets["transformer"]}})
    found = written(tensors, manifest, family)
    lines = []
    for key in (key for key in found if key.endswith(".alpha")):
        stem = key.removesuffix(".alpha")
        down, up = found[f"{stem}.lora_down.weight"], found[f"{stem}.lora_up.weight"]
        lines.append(f"{stem} {down.shape[0]}x{down.shape[1]} {up.shape[0]}x{up.shape[1]} {found[key].item()}")
    assert sorted(lines) == GOLDEN.split("\n")[1:-1]
    assert len(found) == 3 * len(lines)


def test_every_layer_of_flux_has_its_published_name():
    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True)
    found = defaultdict(list)
    for name in layers(net):
        stem, place = flux_keys.stem_of(name)
        found[f"lora_unet_{stem}"].append((place, name))
    assert sorted(found) == sorted(row[0] for row in golden("flux"))
    assert sum("_blocks_" in name for name in found) == 304  # as kohya's trainer reports
    for stem, modules in found.items():
        assert tuple(name for _, name in sorted(modules)) == flux_keys.modules_of(stem.removeprefix("lora_unet_"))
    assert flux_keys.architecture(net)["modelspec.architecture"] == "flux-1-dev/lora"


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, *MLPS, *MODULATIONS), ("to_q", "norm_out.linear")])
def test_what_is_written_reads_back_as_the_same_effect(family, targets):
    patterns = {"alpha_pattern": {"transformer_blocks.0.attn.to_k": 3.0}, "rank_pattern": {"attn.to_v": 2}}
    for changes in ({}, patterns):
        tensors, manifest = adapted(family, targets, **changes)
        expected = effects(tensors, manifest.nets["transformer"])
        same(read(written(tensors, manifest, family), family), expected)


def test_diffusers_reads_the_double_blocks_alike(family):
    tensors, manifest = adapted(family, ATTENTION)
    tensors = {key: value for key, value in tensors.items() if "single" not in key}
    found = stock._convert_kohya_flux_lora_to_diffusers(written(tensors, manifest, family))
    same(effects(found, {"lora_alpha": 4}), effects(tensors, manifest.nets["transformer"]))


def test_diffusers_reads_a_single_block_of_flux_itself_alike():
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    rows = {f"single_transformer_blocks.5.{name}": count for name, count in rows.items()}
    source = torch.Generator().manual_seed(0)
    tensors = {}
    for module, count in rows.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(2, 3072, generator=source)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(count, 2, generator=source)
    manifest = manifest_of({"transformer": {"lora_alpha": 1.0, "r": 2}})
    found = stock._convert_kohya_flux_lora_to_diffusers(flux_keys.to_first_names(tensors, manifest, rows))
    for module in rows:
        up, down = (found[f"transformer.{module}.lora_{side}.weight"] for side in "BA")
        expected = 0.5 * tensors[f"transformer.{module}.lora_B.weight"] @ tensors[f"transformer.{module}.lora_A.weight"]
        torch.testing.assert_close(up @ down, expected)


def layer(stem: str, rows: int, columns: int, names: tuple[str, str]) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(rows)
    down, up = torch.randn(3, columns, generator=source), torch.randn(rows, 3, generator=source)
    return {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up}


FORMATS = {
    "kohya": ("lora_unet_double_blocks_1_img_attn_qkv", ("lora_down.weight", "lora_up.weight")),
    "xlabs": ("double_blocks.1.processor.qkv_lora1", ("down.weight", "up.weight")),
    "xlabs in comfyui": ("diffusion_model.double_blocks.1.processor.qkv_lora1", ("down.weight", "up.weight")),
    "fal": ("base_model.model.double_blocks.1.img_attn.qkv", ("lora_A.weight", "lora_B.weight")),
    "comfyui": ("diffusion_model.double_blocks.1.img_attn.qkv", ("lora_A.weight", "lora_B.weight")),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_layer_of_one_rank_for_all_is_read(kind, family):
    stem, names = FORMATS[kind]
    tensors = layer(stem, 96, 32, names)
    down, up = tensors.values()
    parts = dict(zip(("to_q", "to_k", "to_v"), (up @ down).split(32), strict=True))
    same(read(tensors, family), {f"transformer_blocks.1.attn.{name}": part for name, part in parts.items()})


def test_xlabs_single_blocks_have_no_mlp(family):
    tensors = layer("single_blocks.0.processor.qkv_lora", 96, 32, ("down.weight", "up.weight"))
    assert read(tensors, family).keys() == {f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"}


def test_onetrainers_own_names_and_dora_are_read(family):
    tensors, manifest = adapted(family, ("to_q", "proj_mlp"), use_dora=True)
    found = written(tensors, manifest, family)
    assert all(key.startswith("lora_transformer_") for key in found)
    adapter = read_adapter(found, {}, {}, family)
    assert adapter.nets["transformer"]["use_dora"] and adapter.tensors.keys() == tensors.keys()
    assert all(torch.equal(adapter.tensors[key], value) for key, value in tensors.items())


def test_a_key_without_a_place_is_told(family):
    tensors = layer("lora_unet_double_blocks_9_img_attn_qkv", 96, 32, ("lora_down.weight", "lora_up.weight"))
    with pytest.raises(UserError, match="double_blocks_9"):
        read_adapter(tensors, {}, {}, family)


def test_an_archive_of_the_flux_fine_tuner_opens(family, tiny_flux, tmp_path):
    tensors, _ = adapted(family, ATTENTION)
    folder = tmp_path / "output" / "flux_train_replicate"
    folder.mkdir(parents=True)
    artifact.save_tensors(folder / "lora.safetensors", tensors)
    assert base_of(tmp_path) == "black-forest-labs/FLUX.1-dev"
    with opened(tmp_path, family, str(tiny_flux)) as converted:
        manifest = artifact.read_manifest(converted)
        stored, _ = artifact.load_tensors(converted / artifact.ADAPTER)
    assert (manifest.family, manifest.method) == ("flux", "lora")
    same(effects(stored, manifest.nets["transformer"]), effects(tensors, {"lora_alpha": 4}))


def test_weights_of_flux_are_refused_for_another_model(tiny_sd, load_family, tmp_path):
    artifact.save_tensors(tmp_path / "lora.safetensors", layer("transformer.x_embedder", 32, 16, ("a", "b")))
    with (
        pytest.raises(UserError, match="FLUX"),
        opened(tmp_path, load_family(tiny_sd), str(tiny_sd)),
    ):
        pass
