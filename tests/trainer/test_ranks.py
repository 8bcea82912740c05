"""Ranks cut and LoRA extracted: closed forms, and the base plus what was extracted is the fine-tuned model."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from preprocessing.errors import UserError
from tests.trainer.pictures import drawn, stock_picture
from trainer import export
from trainer.config import JobSettings
from trainer.export import ExportSettings
from trainer.generate import Generator
from trainer.kohya import alpha_of
from trainer.ranks import Cut, resized, svd_of_product
from trainer.weights import Weights, manifest_for, modules

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
XL_ONLY = pytest.mark.parametrize("tiny_model", ["xl"], indirect=True)
RANK, ALPHA = 6, 3.0


@pytest.fixture
def lora(untouched) -> Weights:
    """A linear layer and a convolution of one net, random, of rank 6 and alpha 3; the convolution's true rank is 2."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(RANK, 2, generator=generator) @ torch.randn(2, 8 * 9, generator=generator)
    tensors = {
        "unet.a.lora_A.weight": torch.randn(RANK, 12, generator=generator),
        "unet.a.lora_B.weight": torch.randn(20, RANK, generator=generator),
        "unet.b.lora_A.weight": low.reshape(RANK, 8, 3, 3),
        "unet.b.lora_B.weight": torch.randn(10, RANK, 1, 1, generator=generator),
    }
    job = JobSettings(input_images=Path("x"), method="lora")
    nets = {"unet": {"r": RANK, "lora_alpha": ALPHA}}
    return Weights(manifest_for(untouched, "toybox", job, nets), tensors)


def deltas(weights: Weights) -> dict[str, torch.Tensor]:
    """What each layer's matrix is changed by: [out, in], in float64."""
    found = {}
    for net, module, parts in modules(weights.tensors):
        down, up = (parts[f"lora_{letter}.weight"].double().flatten(1) for letter in "AB")
        rank = down.shape[0]
        pattern = (weights.manifest.nets[net].get("rank_pattern") or {}).get(
            f"^{module}", weights.manifest.nets[net]["r"]
        )
        assert pattern == rank
        found[module] = up @ down * alpha_of(module, rank, weights.manifest.nets[net]) / rank
    return found


def test_the_product_is_decomposed_as_the_whole_matrix_would_be() -> None:
    up, down = torch.randn(30, 5), torch.randn(5, 17)
    inner, values, outer = svd_of_product(up, down)
    torch.testing.assert_close(inner * values @ outer, up.double() @ down.double())
    torch.testing.assert_close(values, torch.linalg.svdvals(up.double() @ down.double())[:5])


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_best_approximation_in_the_frobenius_norm(rank: int, lora: Weights) -> None:
    before, (after, kept) = deltas(lora), resized(lora, Cut(rank))
    for name, found in deltas(after).items():
        values = torch.linalg.svdvals(before[name])
        best = values[rank:].square().sum().sqrt()
        assert (before[name] - found).norm() == pytest.approx(best.item(), rel=1e-5, abs=1e-5)
        assert kept.share([f"unet.{name}"]) == pytest.approx(
            (values[:rank].square().sum() / values.square().sum()).item(), rel=1e-9
        )
    assert after.manifest.nets["unet"]["r"] == rank


@pytest.mark.parametrize("cut", [Cut(RANK), Cut(100), Cut(keep=1.0)])
def test_a_rank_not_below_the_layers_leaves_it_to_the_bit(cut: Cut, lora: Weights) -> None:
    after, kept = resized(lora, cut)
    assert torch.equal(after.tensors["unet.a.lora_A.weight"], lora.tensors["unet.a.lora_A.weight"])
    assert kept.share() == pytest.approx(1)
    for name, found in deltas(after).items():
        torch.testing.assert_close(found, deltas(lora)[name], rtol=1e-5, atol=1e-5)


def test_the_true_rank_is_exact(lora: Weights) -> None:
    after, kept = resized(lora, Cut(2))
    torch.testing.assert_close(deltas(after)["b"], deltas(lora)["b"], rtol=1e-5, atol=1e-4)
    assert kept.share(["unet.b"]) == pytest.approx(1) and kept.share(["unet.a"]) < 0.99


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.95])
def test_keep_takes_the_smallest_rank_that_holds_the_share(keep: float, lora: Weights) -> None:
    after, kept = resized(lora, Cut(keep=keep))
    for name, before in deltas(lora).items():
        shares = torch.linalg.svdvals(before).square().cumsum(0) / before.square().sum()
        count = kept.ranks[f"unet.{name}"]
        assert shares[count - 1] >= keep > (shares[count - 2] if count > 1 else 0)
        assert after.tensors[f"unet.{name}.lora_A.weight"].shape[0] == count
    assert len(set(kept.ranks.values())) == 2  # each layer its own
    assert 100 * keep <= float(kept.told().split(": ")[1].split(" %")[0]) + 0.01


@pytest.mark.slow
@XL_ONLY
def test_resized_weights_draw_and_low_ranks_draw_less_alike(train_variant, lab, tiny_model, tmp_path) -> None:
    folder, method = train_variant("lora text")
    method.detach(lab.family)
    generator = Generator(str(tiny_model), "cpu")
    base = drawn(generator)
    generator.use(folder)
    expected, distances = drawn(generator), []
    for rank in (3, 1):
        export.export(ExportSettings(weights=str(folder), out=tmp_path / str(rank), rank=rank, format="archive"))
        generator.use(tmp_path / str(rank) / "trained_model.tar")
        assert generator.manifests[0].settings["lora_rank"] == rank
        distances.append(np.abs(drawn(generator) - expected).mean())
    assert distances[0] <= distances[1] < np.abs(base - expected).mean()


@pytest.fixture
def tuned(train_variant, lab) -> Path:
    """The archive of a full fine-tune, text encoders too."""
    folder, method = train_variant("full text")
    method.detach(lab.family)
    return folder


def test_extracted_at_full_rank_the_fine_tuned_layers_are_there_again(tuned, lab, tiny_model, tmp_path) -> None:
    told = export.export(ExportSettings(weights=str(tuned), out=tmp_path / "x", extract=True, rank=4096, format="all"))
    assert "of the change's squared norm is in biases, norms and embeddings" in told[1]
    whole = Weights.read(tuned).tensors
    base = {net.name: dict(lab.family.module(net.name).named_parameters()) for net in lab.family.nets}
    generator = Generator(str(tiny_model), "cpu")
    generator.use(tmp_path / "x" / "trained_model.tar")
    found = deltas_by_key(Weights.read(unpack(tmp_path / "x" / "trained_model.tar", tmp_path / "open")))
    changed = [k for k, v in whole.items() if v.dim() > 1 and "embedding.weight" not in k]
    moved = [key for key in changed if not torch.equal(whole[key], base[key.split(".", 1)[0]][key.split(".", 1)[1]])]
    assert {f"{key}.weight" for key in found} == set(moved)
    for key in moved:
        net, _, name = key.partition(".")
        merged = base[net][name].double() + found[key.removesuffix(".weight")].reshape(whole[key].shape)
        torch.testing.assert_close(merged.float(), whole[key], rtol=0, atol=1e-6)


def deltas_by_key(weights: Weights) -> dict[str, torch.Tensor]:
    """As `deltas`, by net and module."""
    found = {}
    for net, module, parts in modules(weights.tensors):
        down, up = (parts[f"lora_{letter}.weight"].double().flatten(1) for letter in "AB")
        found[f"{net}.{module}"] = up @ down * alpha_of(module, down.shape[0], weights.manifest.nets[net]) / len(down)
    return found


def unpack(archive: Path, folder: Path) -> Path:
    shutil.unpack_archive(archive, folder, "tar", filter="data")
    return folder


@SD_ONLY
def test_the_difference_of_two_models_with_only_layers_changed_is_all_of_it(lab, tiny_model, tmp_path) -> None:
    """Base plus the extracted LoRA draws the tuned model's picture, in stock diffusers."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in pipe.unet.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight += 0.05 * torch.randn(layer.weight.shape, generator=generator) * layer.weight.std()
    pipe.save_pretrained(tmp_path / "tuned")
    settings = {"tuned_model": str(tmp_path / "tuned"), "base_model": str(tiny_model), "extract": True}
    told = export.export(ExportSettings(out=tmp_path / "x", rank=4096, trigger_word="ROBO", **settings))
    assert "100.00 % of the squared norm is kept" in told[0] and not any("cannot hold" in line for line in told)
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny_model)
    before = stock_picture(stock)
    stock.load_lora_weights(tmp_path / "x")
    assert np.abs(stock_picture(stock) - stock_picture(pipe)).max() <= 1 < np.abs(before - stock_picture(pipe)).max()
    again = ExportSettings(**(settings | {"tuned_model": str(tiny_model)}), out=tmp_path / "y", rank=4)
    with pytest.raises(UserError, match="do not differ"):
        export.export(again)


def test_models_of_two_families_have_no_difference(tiny_sd, tiny_xl, tmp_path) -> None:
    settings = {"tuned_model": str(tiny_sd), "base_model": str(tiny_xl), "extract": True, "rank": 4}
    with pytest.raises(UserError, match="two of one kind"):
        export.export(ExportSettings(out=tmp_path / "x", **settings))
