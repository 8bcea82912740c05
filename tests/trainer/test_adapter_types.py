"""LoKr and OFT in LoRA's place: their equations, their way through training, archive and merging, who reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file

from preprocessing.errors import UserError
from tests.trainer.pictures import drawn, stock_picture
from trainer import artifact, export, start
from trainer.export import ExportSettings
from trainer.generate import Generator
from trainer.methods import adapters

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
LOKR = {"adapter_type": "lokr", "lora_alpha": 6.0, "lokr_factor": 4, "lora_targets": "attention_conv"}
KINDS: dict[str, dict[str, Any]] = {
    "lokr": LOKR,
    "oft": {"adapter_type": "oft", "lora_alpha": None, "lora_targets": "attention"},
}
BOTH = pytest.mark.parametrize("kind", KINDS)
EACH = pytest.mark.parametrize(("tiny_model", "kind"), [("xl", "lokr"), ("sd", "oft")], indirect=["tiny_model"])


@pytest.fixture
def trained(train_variant, lab) -> Callable[..., Path]:
    """Trains an adapter of a type a little; gives the folder of its archive. The lab's model is the base again."""

    def made(kind: str, variant: str = "pivotal", **changes: Any) -> Path:
        folder, method = train_variant(variant, **KINDS[kind], **changes)
        method.detach(lab.family)
        return folder

    return made


def adapted_layers(lab) -> list[adapters.BaseTunerLayer]:
    return adapters.tuner_layers(lab.family.module("unet"))


@BOTH
def test_it_begins_as_the_base_model_and_detaches_bit_for_bit(kind, lab, create):
    before, prediction = lab.snapshot(), lab.predict("a dog")
    method = create("lora", **KINDS[kind])
    groups = method.attach(lab.family)
    assert all(p.dtype == torch.float32 for group in groups for p in group.parameters)
    torch.testing.assert_close(lab.predict("a dog"), prediction, rtol=1e-5, atol=1e-6)
    method.detach(lab.family)
    method = create("pivotal", **KINDS[kind])
    lab.train(method)
    assert not torch.allclose(lab.predict("a dog"), prediction, atol=1e-4)
    with method.disabled(lab.family):
        assert torch.equal(lab.predict("a dog"), prediction)
    method.set_strength(lab.family, 0.0)
    torch.testing.assert_close(lab.predict("a dog"), prediction, rtol=0, atol=1e-6)
    method.detach(lab.family)
    lab.assert_unchanged(before)


@SD_ONLY
@pytest.mark.parametrize("rank", [2, 1000])
def test_lokr_is_the_scaled_kronecker_product(rank, lab, create):
    """With a rank below half of its size the second factor is a product itself, else a whole matrix."""
    method = create("lora", **LOKR | {"lora_rank": rank})
    lab.train(method)
    whole: set[bool] = set()
    for layer in adapted_layers(lab):
        state = {name.partition(".")[0]: p.detach() for name, p in layer.named_parameters() if "lokr_" in name}
        whole.add("lokr_w2" in state)
        assert max(state["lokr_w1"].shape) <= 4
        second = state["lokr_w2"] if "lokr_w2" in state else state["lokr_w2_a"] @ state["lokr_w2_b"]
        change = 6.0 / rank * torch.kron(state["lokr_w1"], second.flatten(1))
        if second.ndim == 4:  # a kernel's places stay with the second factor
            first = state["lokr_w1"][:, None, :, None, None, None]
            change = 6.0 / rank * first * second[None, :, None]
        found = layer.get_delta_weight(adapters.ADAPTER).detach()
        torch.testing.assert_close(found, change.reshape(found.shape), rtol=1e-4, atol=1e-7)
        assert found.any()
    assert whole == ({True} if rank == 1000 else {True, False})  # the latent's 4 channels are no more than two ranks


@SD_ONLY
def test_lokrs_strength_scales_its_change(lab, create):
    method = create("lora", **LOKR)
    lab.train(method)
    method.set_strength(lab.family, 0.5)
    half = lab.predict("a dog")
    method.set_strength(lab.family, 1.0)
    assert not torch.allclose(lab.predict("a dog"), half, atol=1e-4)
    with torch.no_grad():
        for name, parameter in lab.family.module("unet").named_parameters():
            if ".lokr_w1." in name:
                parameter *= 0.5
    torch.testing.assert_close(lab.predict("a dog"), half, rtol=1e-4, atol=1e-5)


@SD_ONLY
def test_oft_rotates_what_a_layer_reads_and_has_no_strength_between(lab, create):
    method = create("lora", **KINDS["oft"], lora_rank=4)
    lab.train(method)
    for layer in adapted_layers(lab):
        rotation = layer.get_delta_weight(adapters.ADAPTER).detach()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)), rtol=0, atol=1e-5)
        blocks = rotation.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
        outside = blocks * ~torch.eye(len(blocks), dtype=torch.bool)[:, None, :, None]
        assert not outside.any() and not torch.allclose(rotation, torch.eye(len(rotation)), atol=1e-3)
    assert not method.has_strength and not create("pivotal", **KINDS["oft"]).has_strength
    with pytest.raises(UserError, match="oft"):
        method.set_strength(lab.family, 0.5)


@SD_ONLY
def test_oft_leaves_convolutions_alone(lab, create):
    before = lab.snapshot()
    method = create("lora", **KINDS["oft"] | {"lora_targets": "all"})
    with pytest.raises(UserError, match="lora_targets attention"):
        method.attach(lab.family)
    method.detach(lab.family)
    lab.assert_unchanged(before)


@EACH
def test_the_archive_draws_the_same_again(kind, train_variant, lab, tiny_model):
    folder, method = train_variant("pivotal", **KINDS[kind])
    archive = folder.with_suffix(".tar")
    artifact.write(folder, archive)
    generator = Generator(str(tiny_model), "cpu")
    base = drawn(generator)
    generator.use(archive)
    words = method.words(["a photo of TOK"])[0]
    assert torch.equal(lab.predict(words, generator.family), lab.predict(words))
    adapted = drawn(generator)
    assert np.abs(adapted - base).max() > 0
    generator.use(archive)
    assert (drawn(generator) == adapted).all()
    generator.release()
    assert (drawn(generator) == base).all()
    manifest, (tensors, header) = artifact.read_manifest(folder), artifact.load_tensors(folder / artifact.ADAPTER)
    assert {config["peft_type"].lower() for config in manifest.nets.values()} == {kind} == {header["adapter_type"]}
    assert json.loads(header["adapter_config"]) == manifest.nets
    assert all(f".{kind}_" in key for key in tensors)


@EACH
def test_a_merged_model_draws_the_same_in_stock_diffusers(kind, trained, tiny_model, tmp_path):
    folder = trained(kind)
    export.export(ExportSettings(weights=str(folder), out=tmp_path / "merged", merge=True))
    generator = Generator(str(tiny_model), "cpu")
    base = drawn(generator)
    generator.use(folder)
    expected = drawn(generator)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert np.abs(stock_picture(pipe) - expected).max() <= 1 < np.abs(expected - base).max()


@pytest.mark.parametrize(("tiny_model", "rank"), [("sd", 4), ("xl", 1000)], indirect=["tiny_model"])
def test_lokr_for_comfyui_adds_up_to_the_same_weights(rank, trained, tiny_model):
    """By LyCORIS' rule: alpha over the rank of the second factor's product, and 1 where it is no product."""
    folder = trained("lokr", lora_rank=rank)
    tensors, header = artifact.load_tensors(folder / "comfyui" / "adapter.safetensors")
    assert json.loads(header["ss_network_args"])["algo"] == "lokr" and header["ss_network_dim"] == str(rank)
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    unet = generator.family.module("unet")
    found = 0
    for name, layer in unet.named_modules():
        if not isinstance(layer, adapters.BaseTunerLayer):
            continue
        stem = "lora_unet_" + name.replace(".", "_")
        parts = {key.removeprefix(f"{stem}."): value for key, value in tensors.items() if key.startswith(f"{stem}.")}
        scale = 1.0 if "lokr_w2" in parts else parts["alpha"] / parts["lokr_w2_b"].shape[0]
        second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        wanted = layer.get_delta_weight(adapters.ADAPTER)
        if second.ndim == 4:
            change = torch.kron(parts["lokr_w1"][..., None, None], second)
        else:
            change = torch.kron(parts["lokr_w1"], second).reshape(wanted.shape)
        torch.testing.assert_close(scale * change, wanted.detach(), rtol=1e-5, atol=1e-8)
        found += 1
    assert found > 10


@pytest.mark.parametrize(
    ("tiny_model", "kind"), [("sd", "lokr"), ("sd", "oft"), ("flux", "lokr")], indirect=["tiny_model"]
)
def test_other_programs_get_what_they_can_read_and_no_more(kind, trained, tiny_model, tmp_path):
    folder = trained(kind)
    assert (folder / "comfyui" / "adapter.safetensors").exists() == (kind == "lokr" and tiny_model.name == "sd")
    assert (folder / "comfyui" / "embeddings" / "TOK.safetensors").exists()
    with pytest.raises(UserError, match="diffusers has no place"):
        export.export(ExportSettings(weights=str(folder), out=tmp_path / "diffusers", format="diffusers"))
    with pytest.raises(UserError, match=kind):
        export.export(ExportSettings(weights=str(folder), out=tmp_path / "smaller", rank=1))


@SD_ONLY
@BOTH
def test_peft_itself_reads_its_format(kind, trained, tiny_model, tmp_path):
    folder = trained(kind, "lora")
    export.export(ExportSettings(weights=str(folder), out=tmp_path / "files", format="peft"))
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    ours = drawn(generator)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    generator.release()
    generator.family._pipe.unet = PeftModel.from_pretrained(unet, tmp_path / "files" / "peft" / "unet")
    assert (drawn(generator) == ours).all()


@SD_ONLY
@BOTH
def test_training_begins_from_such_weights_and_says_what_does_not_agree(
    kind, trained, lab, create, settings, tiny_model
):
    folder = trained(kind)
    chosen = settings(method="pivotal", base_model=str(tiny_model), init_adapter=str(folder), lora_rank=None)
    with start.opened(chosen.model_copy(update={"lora_targets": None}), lab.family) as begun:
        agreed = start.agreed(chosen, begun, lab.family)
        assert agreed.adapter_type == kind and agreed.lora_rank == 4
        method = create("pivotal", **agreed.model_dump(include={*KINDS[kind], "lora_rank"}) | {"lora_targets": None})
        method.begin_from(begun.folder)
        method.attach(lab.family)
        stored = load_file(folder / artifact.ADAPTER)
        found = adapters.lora_state(lab.family, ["unet"])
        assert found.keys() == stored.keys() and all(torch.equal(value, found[key]) for key, value in stored.items())
        other = settings(**{"adapter_type": "oft"} if kind == "lokr" else LOKR | {"lora_targets": None}, lora_rank=None)
        with pytest.raises(UserError, match="adapter_type"):
            start.agreed(other.model_copy(update={"init_adapter": str(folder)}), begun, lab.family)


@pytest.mark.slow
@BOTH
def test_a_run_that_was_stopped_ends_as_one_that_was_not(kind, settings, train_on, dataset, tmp_path):
    common = {"max_train_steps": 2, "checkpoint_every": 1} | KINDS[kind] | {"lora_targets": "attention"}
    whole = train_on(settings(output_dir=tmp_path / "whole", **common), dataset)
    halves = settings(output_dir=tmp_path / "halves", **common)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on(halves, dataset, stop)
    torch.manual_seed(99)
    resumed = train_on(halves.model_copy(update={"resume": True}), dataset)
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


MISFITS: dict[str, dict[str, Any]] = {
    "use_dora": {"adapter_type": "lokr", "use_dora": True},
    "lora_plus_ratio": {"adapter_type": "oft", "lora_plus_ratio": 2.0},
    "goes with method": {"adapter_type": "lokr", "method": "full"},
    "base_precision": {"adapter_type": "lokr", "base_precision": "nf4"},
    "save_diffusers": {"adapter_type": "oft", "save_diffusers": True},
    "lora_alpha": {"adapter_type": "oft", "lora_alpha": 3.0},
    "lokr_factor": {"lokr_factor": 0},
}


@pytest.mark.parametrize("said", MISFITS)
def test_what_cannot_work_together_is_refused(said, settings):
    with pytest.raises(ValidationError, match=said):
        settings(**MISFITS[said])
