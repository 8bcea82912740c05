"""The Stable Diffusion families are the stock pipelines: same pictures, same loss, same text, same latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer import families
from trainer.artifact import save_tensors
from trainer.cache import encode_dataset
from trainer.families.base import DENOISER, TEXT, VAE, Family
from trainer.methods.tokens import NewTokens
from trainer.objectives import Ddpm
from trainer.samples import Batch, Picture

CAPTIONS = ["a photo of a dog", "it"]


@pytest.fixture(scope="module")
def family(tiny_model, load_family) -> Family:
    return load_family(tiny_model)


def latents(count: int = 2) -> tuple[Tensor, Tensor]:
    data, noise = torch.randn(2, count, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return data, noise


def stock_text(family: Family, captions: list[str]) -> dict[str, Tensor]:
    """The text conditioning as the papers' code makes it, from the tokenizers and encoders alone."""
    hidden = []
    for tower in family.text:
        ids = tower.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = tower.encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2] if len(family.text) == 2 else output.last_hidden_state)
    if len(hidden) == 1:
        return {"context": hidden[0]}
    return {"context": torch.cat(hidden, -1), "pooled": output.text_embeds}


def test_text_is_encoded_as_the_pipelines_do(family):
    found, expected = family.encode_text(CAPTIONS), stock_text(family, CAPTIONS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    assert found["context"].shape == (2, 77, 80 if "pooled" in found else 32)


def test_long_captions_are_cut_at_what_the_encoder_reads(family):
    long = "a very long caption " * 40
    assert family.encode_text([long])["context"].shape[1] == 77
    assert torch.equal(family.encode_text([long])["context"], family.encode_text([long + "more"])["context"])


def test_no_caption_is_the_empty_text_or_zeros_for_xl(family):
    null, empty = family.null_conditioning(), family.encode_text([""])
    for name, value in null.items():
        assert torch.equal(value, torch.zeros_like(empty[name]) if "pooled" in empty else empty[name])
        assert value.shape == empty[name].shape


def test_no_caption_is_the_empty_text_where_an_xl_says_so(tiny_xl, tmp_path, load_family):
    folder = shutil.copytree(tiny_xl, tmp_path / "xl")
    edit_index(folder, force_zeros_for_empty_prompt=False)
    family = load_family(folder)
    assert torch.equal(family.null_conditioning()["context"], family.encode_text([""])["context"])


def test_pooled_text_is_read_at_its_end_though_new_tokens_have_larger_ids(tiny_xl, load_family):
    family = load_family(tiny_xl)
    tokens = NewTokens({"TOK": ["<s0>", "<s1>"]})
    tokens.attach(family, {}, seed=0)
    captions = tokens.words(["a TOK on a beach", "TOK"])
    tower = family.text[1]
    ids = tower.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    new = tower.tokenizer.convert_tokens_to_ids(["<s0>", "<s1>"])
    assert min(new) > tower.tokenizer.eos_token_id and all(set(new) <= set(row) for row in ids.tolist())
    last = tower.encoder(ids).last_hidden_state
    ends = [row.index(tower.tokenizer.eos_token_id) for row in ids.tolist()]
    pooled = torch.stack([tower.encoder.text_projection(last[i, end]) for i, end in enumerate(ends)])
    torch.testing.assert_close(family.encode_text(captions)["pooled"], pooled)


def batch_of(captions: list[str], conditioning: dict[str, Tensor], uniform: list[float], mask: Tensor | None) -> Batch:
    data, noise = latents(len(captions))
    return Batch(data, noise, torch.tensor(uniform), captions, mask, conditioning, [])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_training_loss_is_the_textbooks(family, prediction, gamma, monkeypatch):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDPMScheduler(**config, prediction_type=prediction)
    monkeypatch.setattr(family, "objective", Ddpm(scheduler))
    mask = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)).round()
    text = stock_text(family, CAPTIONS)
    time_ids = torch.tensor([[80.0, 100, 0, 4, 32, 32], [32, 32, 0, 0, 32, 32]])
    batch = batch_of(CAPTIONS, {"time_ids": time_ids}, [0.1234, 0.98], mask)
    found = family.training_loss(batch, batch.conditioning | text, gamma)

    steps = torch.tensor([123, 980])
    noisy = scheduler.add_noise(batch.data, batch.noise, steps)
    extra = {"text_embeds": text["pooled"], "time_ids": time_ids} if "pooled" in text else None
    predicted = family.module("unet")(noisy, steps, text["context"], added_cond_kwargs=extra).sample
    alpha = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    target = {
        "epsilon": batch.noise,
        "v_prediction": alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.data,
        "sample": batch.data,
    }[prediction]
    snr = (alpha / (1 - alpha)).flatten()
    clipped = snr.clamp(max=gamma) if gamma else snr
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction]
    weights = clipped / over if gamma else torch.ones(2)
    error = (predicted - target) ** 2 * mask
    expected = (weights * error.sum(dim=(1, 2, 3)) / (4 * mask.sum(dim=(1, 2, 3)))).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sizes_and_crop_condition_xl_only(family):
    text = stock_text(family, ["it"])
    plain, cropped = torch.tensor([[32.0, 32, 0, 0, 32, 32]]), torch.tensor([[80.0, 100, 0, 4, 32, 32]])
    losses = {
        family.training_loss(batch_of(["it"], {"time_ids": ids}, [0.5], None), {"time_ids": ids} | text, None).item()
        for ids in (plain, cropped)
    }
    assert len(losses) == (2 if "pooled" in text else 1)


def cropped_dataset(dataset: PreparedDataset) -> PreparedDataset:
    """The data set as if its first picture were cut at (left 4, top 0) out of 44x32, itself made from 110x80."""
    changes = {"original_size": (110, 80), "resized_size": (44, 32), "crop": (4, 0)}
    first = dataset.items[0].model_copy(update=changes)
    return dataset.model_copy(update={"items": (first, *dataset.items[1:])})


def test_samples_carry_the_true_size_and_crop(family, dataset):
    dataset = cropped_dataset(dataset)
    for flip, left in ((False, 4), (True, 44 - 32 - 4)):
        conditioning = [s.conditioning for s in encode_dataset(family, dataset, flip, lambda *_: None)]
        if family.name == "stable_diffusion":
            assert conditioning == [{}] * 4
        else:
            assert conditioning[0]["time_ids"].tolist() == [80, 110, 0, left, 32, 32]
            assert conditioning[1]["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]


def test_latents_are_the_scaled_posterior(family):
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mask = torch.zeros(1, 32, 48)
    mask[:, :16, :24] = 1
    pictures = [Picture(p, m, (32, 48), (0, 0)) for p, m in zip(pixels, (mask, None, None), strict=True)]
    samples = family.encode(pictures, ["a", "b", "c"])
    vae = family.module("vae")
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    for i, sample in enumerate(samples):
        torch.testing.assert_close(sample.mean, posterior.mean[i] * vae.config.scaling_factor)
        torch.testing.assert_close(sample.std, posterior.std[i] * vae.config.scaling_factor)
        assert sample.mean.shape == (4, 16, 24) and sample.caption == "abc"[i]
    assert samples[0].mask.shape == (1, 16, 24) and samples[1].mask is None
    assert samples[0].mask[:, :8, :12].eq(1).all() and samples[0].mask.sum() == 8 * 12


def test_the_data_set_is_encoded_in_order_whatever_the_sizes(family, dataset, tmp_path):
    wide = dataset.items[0].model_copy(update={"image": "images/wide.png", "caption": "TOK wide", "size": (48, 32)})
    Image.new("RGB", (48, 32), (9, 200, 30)).save(dataset.folder / wide.image)
    mixed = dataset.model_copy(update={"items": (dataset.items[0], wide, *dataset.items[1:])})
    samples = encode_dataset(family, mixed, False, lambda *_: None)
    assert [s.caption for s in samples] == [item.caption for item in mixed.items]
    assert [tuple(s.mean.shape[-2:]) for s in samples] == [(16, 16), (16, 24), (16, 16), (16, 16), (16, 16)]
    alone = encode_dataset(family, dataset, False, lambda *_: None)
    torch.testing.assert_close(samples[-1].mean, alone[-1].mean, rtol=1e-4, atol=1e-5)


def test_mirrored_samples_are_those_of_mirrored_pictures(family, dataset):
    mirrored = encode_dataset(family, dataset, True, lambda *_: None)
    for item in dataset.items:
        with Image.open(dataset.folder / item.image) as picture:
            flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        flipped.save(dataset.folder / item.image)
    by_hand = encode_dataset(family, dataset, False, lambda *_: None)
    for a, b in zip(mirrored, by_hand, strict=True):
        torch.testing.assert_close(a.mean, b.mean)


def test_only_the_parts_asked_for_are_loaded(tiny_model):
    family = families.family_class(str(tiny_model)).load(str(tiny_model), frozenset({DENOISER}), torch.float32)
    assert family.text == [] and family.module("unet") is not None and family.module("vae") is None


def test_a_freed_part_is_gone_and_the_rest_predicts(tiny_model, load_family):
    family = load_family(tiny_model)
    text = family.encode_text(["it"]) | {"time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    data, _ = latents(1)
    before = family.predict(data, torch.tensor([0.5]), text)
    family.free(VAE)
    family.free(TEXT)
    assert family.text == [] and family.module("vae") is None
    assert torch.equal(family.predict(data, torch.tensor([0.5]), text), before)


def test_nothing_is_trainable_or_in_training_mode_after_loading(family):
    modules = [family.module(net.name) for net in family.nets]
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_geometry_is_read_from_the_configs(tiny_model, tmp_path):
    family = families.family_class(str(tiny_model))
    # 2 VAE levels halve once, 2 UNet levels once more
    assert (family.geometry(str(tiny_model)).stride, family.geometry(str(tiny_model)).resolution) == (4, 32)
    checkpoint = tmp_path / "any.safetensors"
    checkpoint.touch()
    usual = {"stable_diffusion": (64, 512), "stable_diffusion_xl": (32, 1024)}[family.name]
    assert (family.geometry(str(checkpoint)).stride, family.geometry(str(checkpoint)).resolution) == usual


def edit_index(folder: Path, **changes: object) -> None:
    index = folder / families.INDEX
    index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def broken(folder: Path, kind: str) -> Path:
    """A base model with one thing wrong with it."""
    if kind == "other class":
        edit_index(folder, _class_name="PaintByExamplePipeline")
    elif kind == "no index":
        (folder / families.INDEX).unlink()
    elif kind == "damaged index":
        (folder / families.INDEX).write_text('{"_class_name": "Stab', encoding="utf-8")
    elif kind == "index of something else":
        (folder / families.INDEX).write_text("[]", encoding="utf-8")
    elif kind == "no unet config":
        (folder / "unet" / "config.json").unlink()
    elif kind == "missing folder":
        return folder / "not" / "there"
    elif kind == "no safetensors":
        (folder / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        return folder / "a.safetensors"
    elif kind == "empty file":
        (folder / "a.safetensors").touch()
        return folder / "a.safetensors"
    elif kind == "a LoRA and no checkpoint":
        save_tensors(folder / "a.safetensors", {"unet.lora_A.weight": torch.zeros(1)})
        return folder / "a.safetensors"
    return folder


FAULTS = ["other class", "no index", "damaged index", "index of something else", "no unet config"]
FAULTS += ["missing folder", "no safetensors", "empty file", "a LoRA and no checkpoint"]


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_no_base_model_is_refused_in_one_sentence(tiny_sd, tmp_path, kind):
    source = broken(shutil.copytree(tiny_sd, tmp_path / "model"), kind)
    with pytest.raises(UserError) as caught:
        families.family_class(str(source)).geometry(str(source))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    if kind == "other class":
        assert "PaintByExamplePipeline" in str(caught.value)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b""])
def test_weights_that_did_not_arrive_are_refused_in_one_sentence(tiny_sd, tmp_path, load_family, content):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model"):
        load_family(folder)


def test_toybox_is_a_name_for_its_folder():
    assert families.resolve("toybox") == str(families.TOYBOX / "sd")
    assert families.resolve("someone/model") == "someone/model"


def test_a_models_own_defaults_come_before_the_familys(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    own = {"any": {"max_train_steps": 7, "learning_rate": 1.0}, "lora": {"max_train_steps": 9}}
    (folder / families.RECOMMENDED).write_text(json.dumps(own), encoding="utf-8")
    usual = families.family_class(str(folder)).recommended
    assert families.recommended(str(folder), "lora") == usual["any"] | {"learning_rate": 1.0, "max_train_steps": 9}
    assert families.recommended(str(folder), "pivotal")["max_train_steps"] == 7
    # the model speaks last: what it says of any method holds for full too
    assert families.recommended(str(folder), "full")["learning_rate"] == 1.0


def test_fingerprint_tells_weights_and_configs_apart(tiny_sd, tmp_path):
    def fingerprint() -> str:
        return families.fingerprint(str(folder))

    folder = shutil.copytree(tiny_sd, tmp_path / "renamed")
    seen = [fingerprint()]
    assert seen[0] == families.fingerprint(str(tiny_sd))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # the last byte of the last weight, well behind the header
    weights.write_bytes(changed)
    seen.append(fingerprint())
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("epsilon", "v_prediction"), encoding="utf-8")
    seen.append(fingerprint())
    assert len(set(seen)) == 3


def test_fingerprint_of_a_file_is_of_its_content(tmp_path):
    first, second, other = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, value in ((first, 0.0), (second, 0.0), (other, 1.0)):
        save_tensors(path, {"x": torch.full((4,), value)})
    assert families.fingerprint(str(first)) == families.fingerprint(str(second)) != families.fingerprint(str(other))
