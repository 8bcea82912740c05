"""Method prefix in every family: what is saved and drawn, negatives and dropped captions, mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.errors import UserError
from tests.trainer.pictures import drawn
from trainer import artifact, cache, export, job, methods
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.evaluation.summary import Summary
from trainer.generate import Generator
from trainer.step import TrainStep

ENCODERS = {"tiny_flux": {"text_encoder", "text_encoder_2"}, "tiny_prior": {"text_encoder"}}
SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        Image.new("RGB", (32, 32), (200, 90 * i, 20)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"TOK number {i}", encoding="utf-8")
    return folder


@pytest.fixture
def trained(pictures, settings, request, tmp_path):
    """Runs a whole job on one of the tiny models; gives its output_dir."""

    def run(base: str = "tiny_sd", **changes: object) -> Path:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        fixed = {"input_images": pictures, "output_dir": out, "method": "prefix", "num_prefix_tokens": 3, "workers": 0}
        fixed |= {"base_model": str(request.getfixturevalue(base)), "learning_rate": 0.1, "caption_dropout": 0.5}
        fixed |= {"preview_prompts": ("TOK",), "preview_seeds": (0,)}
        if base == "tiny_prior":
            fixed["companion_model"] = str(request.getfixturevalue("tiny_decoder"))
        job.train(JobSettings.model_validate(settings().model_dump() | fixed | changes))
        return out

    return run


@pytest.mark.parametrize("base", ENCODERS)
def test_every_family_learns_saves_and_draws_with_it(base, trained, request):
    """Stable Diffusion and XL: test_saved.py; OmniGen2: test_omnigen2_jobs.py."""
    out = trained(base)
    with artifact.opened(out / "trained_model.tar") as folder:
        tensors, header = artifact.load_tensors(folder / artifact.PREFIX)
        files = {path.name for path in folder.glob("*.safetensors")}
        card = (folder / artifact.CARD).read_text(encoding="utf-8")
        Summary.model_validate_json((folder / artifact.EVALUATION).read_text(encoding="utf-8"))
    assert files == {artifact.PREFIX} and header["method"] == "prefix"
    assert tensors.keys() == {f"{name}.prompt_embeddings" for name in ENCODERS[base]}
    assert all(value.shape[0] == 3 and value.dtype == torch.float32 for value in tensors.values())
    assert "Diffusers has no place" in card and "load_lora_weights" not in card
    companion = str(request.getfixturevalue("tiny_decoder")) if base == "tiny_prior" else None
    generator = Generator(str(request.getfixturevalue(base)), "cpu", companion)
    before = drawn(generator)
    generator.use(out / "trained_model.tar")
    adapted = drawn(generator)
    assert np.abs(adapted - before).max() > 0
    assert (drawn(generator, lora_scale=0.0) == before).all()
    assert (drawn(generator, lora_scale=0.5) != adapted).any()
    generator.release()
    assert (drawn(generator) == before).all()


@SD_ONLY
@pytest.mark.parametrize("asked", [False, True])
def test_negatives_are_read_without_the_prefix_unless_asked(asked, train_variant, tiny_sd):
    folder, _ = train_variant("prefix", prefix_on_negative=asked)
    generator = Generator(str(tiny_sd), "cpu")
    base = {text: generator.family.encode_text([text])["context"] for text in ("", "a hill")}
    generator.use(folder)
    for text, plain in base.items():
        negative = generator._negative(1, DrawSettings(prompt="a", negative_prompt=text))["context"]
        assert torch.equal(negative, plain) != asked
        assert not torch.equal(generator.family.encode_text([text])["context"], plain)


@SD_ONLY
@pytest.mark.parametrize("asked", [False, True])
def test_a_dropped_caption_is_the_base_models_null_unless_asked(asked, lab, create, dataset):
    method = create("prefix", prefix_on_negative=asked)
    known = cache.build(lab.family, dataset, ["a dog"], lambda *_: None)
    ((parameter,),) = [group.parameters for group in method.attach(lab.family)]
    found = TrainStep(lab.family, method, known, method.settings).conditioning(["", "a dog"])["context"]
    assert torch.equal(found[:1], known.text[""]["context"]) != asked
    assert not torch.equal(found[1:], known.text["a dog"]["context"])
    (gradient,) = torch.autograd.grad(found[0].square().sum(), parameter)
    assert bool(gradient.any()) == asked


@SD_ONLY
def test_methods_know_whether_they_change_what_other_prompts_are_encoded_to(create):
    assert create("prefix").changes_text and create("prefix").changes_weights
    assert not create("pivotal").changes_text and create("lora text").changes_text and create("full text").changes_null


@SD_ONLY
@pytest.mark.parametrize("kind", ["missing", "of something else"])
def test_weights_without_a_prefix_say_so(kind, train_variant, tiny_sd, tmp_path):
    folder = shutil.copytree(train_variant("prefix")[0], tmp_path / "damaged")
    (folder / artifact.PREFIX).unlink()
    if kind != "missing":
        artifact.save_tensors(folder / artifact.PREFIX, {"x": torch.zeros(1)})
    generator = Generator(str(tiny_sd), "cpu")
    before = drawn(generator)
    with pytest.raises(UserError, match=r"^No prefix token parameters found"):
        generator.use(folder)
    assert (drawn(generator) == before).all()


@SD_ONLY
def test_a_prefix_of_another_width_is_refused(train_variant, tiny_sd, tmp_path):
    folder = shutil.copytree(train_variant("prefix")[0], tmp_path / "other")
    artifact.save_tensors(folder / artifact.PREFIX, {"text_encoder.prompt_embeddings": torch.zeros(3, 8)})
    with pytest.raises(UserError, match=r"prefix for the text_encoder is of shape \(3, 8\)"):
        Generator(str(tiny_sd), "cpu").use(folder)


@SD_ONLY
def test_training_goes_on_from_a_prefix(train_variant, trained):
    start, _ = train_variant("prefix")
    same = trained(init_adapter=str(start), learning_rate=0.0, num_prefix_tokens=10)
    tensors = [artifact.load_tensors(one / artifact.PREFIX)[0] for one in (start, same / "weights" / "last")]
    assert tensors[0]["text_encoder.prompt_embeddings"].shape == (4, 32)
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    with pytest.raises(UserError, match="num_prefix_tokens 7 does not agree"):
        trained(init_adapter=str(start), num_prefix_tokens=7)
    with pytest.raises(UserError, match="made by method prefix, which method lora cannot start from"):
        trained(init_adapter=str(start), method="lora")


@SD_ONLY
def test_other_programs_formats_are_refused_and_so_is_merging(train_variant, tmp_path):
    weights = str(train_variant("prefix")[0])
    with pytest.raises(UserError, match="have no form in other programs"):
        export.export(export.ExportSettings(weights=weights, out=tmp_path / "a"))
    with pytest.raises(UserError, match="method prefix cannot be merged"):
        export.export(export.ExportSettings(weights=weights, out=tmp_path / "b", merge=True))


def test_a_caption_has_less_room_beside_it(settings, tiny_sd, load_family):
    family = load_family(tiny_sd)
    (tower,) = family.text
    method = methods.create(settings(method="prefix", num_prefix_tokens=4))
    assert method.reserved(tower) == 4 and methods.create(settings(method="lora")).reserved(tower) == 0


def test_defaults_are_the_published_ones(settings):
    chosen = settings(method="prefix", learning_rate=None)
    assert chosen.num_prefix_tokens == 10 and job.fill(chosen).learning_rate == 1e-4
