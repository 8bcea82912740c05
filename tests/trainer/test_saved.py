"""What a method saves: the same pictures from the archive, from stock diffusers, and the base again after release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from preprocessing.errors import UserError
from tests.trainer.pictures import PROMPT, drawn, stock_picture
from trainer import artifact
from trainer.drawing import DrawSettings
from trainer.generate import Generator
from trainer.methods.base import Method

# both models have text and a denoiser alike; XL has two encoders and pooled text beside
XL_ONLY = pytest.mark.parametrize("tiny_model", ["xl"], indirect=True)
SLOW = pytest.mark.slow


@pytest.fixture
def save(train_variant) -> Callable[..., tuple[Path, Method]]:
    """Trains a variant a little and packs it; gives the archive (its folder lies beside it) and the attached method."""

    def saved(variant: str, **changes: Any) -> tuple[Path, Method]:
        folder, method = train_variant(variant, **changes)
        archive = folder.with_suffix(".tar")
        artifact.write(folder, archive)
        return archive, method

    return saved


@pytest.mark.parametrize(
    "variant",
    [
        "pivotal",
        "full",
        "prefix",
        "perfusion",
        *(pytest.param(v, marks=SLOW) for v in ("inversion", "lora", "full text")),
    ],
)
def test_loaded_weights_are_the_trained_ones(variant, lab, save, tiny_model):
    archive, method = save(variant)
    generator = Generator(str(tiny_model), "cpu")
    base = drawn(generator)
    generator.use(archive)
    words = method.words([PROMPT])[0]
    assert torch.equal(lab.predict(words, generator.family), lab.predict(words))
    adapted = drawn(generator)
    assert np.abs(adapted - base).max() > 0
    assert (adapted == stock_picture(lab.family.pipeline(), words)).all()
    generator.release()
    method.detach(lab.family)
    assert (drawn(generator) == base).all()
    assert torch.equal(lab.predict(PROMPT, generator.family), lab.predict(PROMPT))


@XL_ONLY
def test_one_archive_after_another_leaves_nothing_behind(save, lab, tiny_model):
    first, method = save("pivotal dora")
    method.detach(lab.family)
    second, method = save("pivotal")
    method.detach(lab.family)
    third, _ = save("full")
    fresh = {}
    for archive in (first, second, third):
        generator = Generator(str(tiny_model), "cpu")
        generator.use(archive)
        fresh[archive] = drawn(generator)
    generator = Generator(str(tiny_model), "cpu")
    for archive in (first, third, second, first, first, second):
        generator.use(archive)
        assert (drawn(generator) == fresh[archive]).all()
    assert len({picture.tobytes() for picture in fresh.values()}) == 3


@XL_ONLY
def test_an_unpacked_folder_serves_as_well(save, tiny_model):
    archive, _ = save("pivotal")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(archive)
    packed = drawn(generator)
    generator.use(archive.with_suffix(""))
    assert (drawn(generator) == packed).all()


@pytest.mark.parametrize(
    "variant", ["pivotal", "pivotal dora", "lora text", *(pytest.param(v, marks=SLOW) for v in ("lora", "inversion"))]
)
def test_stock_diffusers_draws_the_same_from_our_files(variant, lab, save, tiny_model):
    archive, method = save(variant)
    folder = archive.with_suffix("")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    base = stock_picture(pipe, PROMPT)
    if (folder / artifact.ADAPTER).exists():
        pipe.load_lora_weights(folder, weight_name=artifact.ADAPTER)
    names = list(method.tokens())
    if names:
        rows, _ = artifact.load_tensors(folder / artifact.EMBEDDINGS)
        towers = {"clip_l": (pipe.text_encoder, pipe.tokenizer)}
        if "clip_g" in rows:
            towers["clip_g"] = (pipe.text_encoder_2, pipe.tokenizer_2)
        for key, (encoder, tokenizer) in towers.items():
            pipe.load_textual_inversion(list(rows[key]), token=names, text_encoder=encoder, tokenizer=tokenizer)
            for module in encoder.modules():
                if getattr(module, "eos_token_id", None) == 2:  # else XL pools at the last new token
                    module.eos_token_id = tokenizer.eos_token_id
    found = stock_picture(pipe, method.words([PROMPT])[0])
    ours = stock_picture(lab.family.pipeline(), method.words([PROMPT])[0])
    assert np.abs(found - ours).max() <= 1 and np.abs(found - base).max() > 1


@XL_ONLY
def test_a_full_fine_tune_is_the_nets_own_weights(lab, save, tiny_model):
    archive, _ = save("full text")
    tensors, _ = artifact.load_tensors(archive.with_suffix("") / artifact.ADAPTER)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    for name in {key.split(".")[0] for key in tensors}:
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        getattr(pipe, name).load_state_dict(state)
    assert (stock_picture(pipe, PROMPT) == stock_picture(lab.family.pipeline(), PROMPT)).all()


@XL_ONLY
@pytest.mark.parametrize("variant", ["pivotal", "pivotal dora"])
def test_both_scales_at_zero_draw_the_base_models_picture_of_the_class_word(variant, save, tiny_model):
    archive, _ = save(variant, class_word="dog")
    generator = Generator(str(tiny_model), "cpu")
    expected = drawn(generator, "dog on a hill")
    generator.use(archive)
    assert (drawn(generator, lora_scale=0.0, token_scale=0.0) == expected).all()
    assert (drawn(generator, lora_scale=1.0, token_scale=0.0) != expected).any() or variant == "inversion"


@XL_ONLY
@pytest.mark.parametrize("variant", ["lora", "lora text"])
def test_lora_scale_zero_draws_the_base_models_picture(variant, save, tiny_model):
    archive, _ = save(variant)
    generator = Generator(str(tiny_model), "cpu")
    expected = drawn(generator)
    generator.use(archive)
    assert (drawn(generator, lora_scale=0.0) == expected).all()
    assert (drawn(generator, lora_scale=0.5) != expected).any()


@XL_ONLY
def test_a_scale_holds_for_one_call(save, tiny_model):
    archive, _ = save("pivotal")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(archive)
    before = drawn(generator)
    assert (drawn(generator, lora_scale=0.3) != before).any()
    assert (drawn(generator) == before).all()


@XL_ONLY
def test_token_scale_moves_between_the_class_word_and_the_tokens(save, tiny_model):
    archive, _ = save("inversion", class_word="dog")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(archive)
    family, method_words = generator.family, "<s0><s1> on a hill"
    plain, whole = family.encode_text(["dog on a hill"]), family.encode_text([method_words])
    half = generator._conditioning([PROMPT], DrawSettings(prompt=PROMPT, token_scale=0.5))
    for name, value in half.items():
        torch.testing.assert_close(value, (plain[name] + whole[name]) / 2, rtol=1e-4, atol=1e-5)
    # the scale of its own falls with the weights': 0.5 + 0.5 x lora_scale^0.4
    own = generator._conditioning([PROMPT], DrawSettings(prompt=PROMPT, lora_scale=0.25))
    scale = 0.5 + 0.5 * 0.25**0.4
    for name, value in own.items():
        torch.testing.assert_close(value, plain[name] + scale * (whole[name] - plain[name]), rtol=1e-4, atol=1e-5)
    untouched = generator._conditioning(["a dog"], DrawSettings(prompt="a dog", token_scale=0.5))
    assert all(torch.equal(value, family.encode_text(["a dog"])[name]) for name, value in untouched.items())


@XL_ONLY
def test_the_trigger_in_a_negative_prompt_is_the_tokens_too(save, tiny_model):
    archive, _ = save("inversion")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(archive)
    named = drawn(generator, "a hill", negative_prompt="TOK")
    assert (named == drawn(generator, "a hill", negative_prompt="<s0><s1>")).all()


@XL_ONLY
def test_full_has_no_strength_to_set(save, tiny_model):
    archive, _ = save("full")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(archive)
    with pytest.raises(UserError, match="lora_scale"):
        drawn(generator, lora_scale=0.5)


@XL_ONLY
def test_weights_of_another_family_are_refused(save, tiny_sd, tiny_xl, tiny_model):
    archive, _ = save("lora")
    other = Generator(str(tiny_xl if tiny_model == tiny_sd else tiny_sd), "cpu")
    before = drawn(other)
    with pytest.raises(UserError, match="stable_diffusion"):
        other.use(archive)
    assert (drawn(other) == before).all()


def edited(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors, header = artifact.load_tensors(folder / name)
    change(tensors)
    artifact.save_tensors(folder / name, tensors, {k: v for k, v in header.items() if k != "format"})


def lora_of_another_width(tensors: dict[str, torch.Tensor]) -> None:
    name = next(key for key in tensors if ".lora_A." in key)
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 8)


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[-1]]


def narrow_all(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: value[..., :-1].contiguous() for name, value in tensors.items()}


def damage(folder: Path, kind: str) -> None:
    """One thing that is wrong with a folder of weights."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    if kind == "unknown setting":
        manifest["settings"]["magic"] = 1
    elif kind == "unknown method":
        manifest["settings"]["method"] = "magic"
    elif kind == "unknown net":
        manifest["nets"]["magic"] = manifest["nets"]["unet"]
    elif kind == "unknown LoRA option":
        manifest["nets"]["unet"]["magic"] = True
    elif kind == "no adapter":
        (folder / artifact.ADAPTER).unlink()
    elif kind == "LoRA of another width":
        edited(folder, artifact.ADAPTER, lora_of_another_width)
    elif kind == "LoRA matrix missing":
        edited(folder, artifact.ADAPTER, drop_one)
    elif kind == "no embeddings":
        (folder / artifact.EMBEDDINGS).unlink()
    elif kind == "embeddings of one encoder missing":
        edited(folder, artifact.EMBEDDINGS, drop_one)
    elif kind == "embeddings of another width":
        edited(folder, artifact.EMBEDDINGS, narrow_all)
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


DAMAGES = ["unknown setting", "unknown method", "unknown net", "unknown LoRA option", "no adapter"]
DAMAGES += ["LoRA of another width", "LoRA matrix missing", "no embeddings", "embeddings of one encoder missing"]
DAMAGES += ["embeddings of another width"]


@XL_ONLY
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_refused_and_leave_the_base(kind, save, tiny_model, tmp_path):
    archive, _ = save("pivotal")
    generator = Generator(str(tiny_model), "cpu")
    before = drawn(generator)
    folder = shutil.copytree(archive.with_suffix(""), tmp_path / "damaged")
    damage(folder, kind)
    with pytest.raises(UserError) as caught:
        generator.use(folder)
    assert "\n" not in str(caught.value)
    assert (drawn(generator) == before).all()
    generator.use(archive)
    assert (drawn(generator) != before).any()


@XL_ONLY
@pytest.mark.parametrize("kind", ["no adapter", "tensor missing", "tensors of another width"])
def test_damaged_full_weights_are_refused_and_leave_the_base(kind, save, tiny_model, tmp_path):
    archive, _ = save("full")
    generator = Generator(str(tiny_model), "cpu")
    before = drawn(generator)
    folder = shutil.copytree(archive.with_suffix(""), tmp_path / "damaged")
    if kind == "no adapter":
        damage(folder, kind)
    else:
        edited(folder, artifact.ADAPTER, drop_one if kind == "tensor missing" else narrow_all)
    with pytest.raises(UserError):
        generator.use(folder)
    assert (drawn(generator) == before).all()
