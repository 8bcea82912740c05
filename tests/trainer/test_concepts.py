"""Several concepts in one job: each word's tokens learn from its own captions alone, and come back as they were."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocessing.concepts import Concept
from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from tests.trainer.pictures import drawn
from tests.trainer.two_concepts import ROB, TEA, TWO, of_two
from trainer import artifact, cache, export, foreign, job, loop, preflight, start, ui_files
from trainer.artifact import Manifest
from trainer.commandline import build_parser, read
from trainer.config import JobSettings
from trainer.fitting import preserved_prompts
from trainer.generate import Generator
from trainer.methods.tokens import NewTokens, token_names

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
BOTH = "a ROB, TEA's TEAM and ROB."


@pytest.fixture
def two(dataset: PreparedDataset) -> PreparedDataset:
    return of_two(dataset)


@pytest.fixture
def trained(train_variant, lab, two) -> Callable[..., Path]:
    """Trains both concepts a little; gives the folder of the archive. The lab's model is the base again."""

    def made(variant: str = "pivotal", **changes: Any) -> Path:
        lab.caption = "a photo of ROB and TEA"
        folder, method = train_variant(variant, concepts=TWO, class_word="", **changes)
        method.detach(lab.family)
        return folder

    return made


def test_tokens_are_numbered_on_and_replaced_in_one_pass(create):
    for variant in ("pivotal", "inversion"):
        method = create(variant, concepts=TWO, class_word="")
        assert method.tokens() == ("<s0>", "<s1>", "<s2>", "<s3>", "<s4>")
        assert method.words([BOTH]) == ["a <s0><s1><s2>, <s3><s4>'s TEAM and <s0><s1><s2>."]
    assert create("lora", concepts=TWO).words([BOTH]) == [BOTH]
    tokens = NewTokens({"s0": ["<s0>"], "C++": ["<s1>"]})  # a trigger that is found in a token, and signs
    assert tokens.words(["C++ s0"]) == ["<s1> <s0>"]


def test_each_words_tokens_start_near_its_class_word_and_the_first_as_those_of_one_alone(lab, create):
    def rows(**changes: Any) -> list[torch.Tensor]:
        method = create("inversion", **changes)
        (group,) = method.attach(lab.family)
        found = [p.detach().clone() for p in group.parameters]
        method.detach(lab.family)
        return found

    alone, both = rows(class_word="dog", n_tokens=3), rows(concepts=TWO)
    for tower, one, two in zip(lab.family.text, alone, both, strict=True):
        assert two.shape == (5, one.shape[1]) and torch.equal(two[:3], one)
        vocabulary = tower.encoder.get_input_embeddings().weight.detach()
        centre = vocabulary[tower.tokenizer("cat", add_special_tokens=False).input_ids].mean(dim=0)
        assert ((two[3:] - centre).std(dim=1) < 0.2 * vocabulary.std(dim=1).mean()).all()


@pytest.mark.parametrize(
    ("caption", "moved"),
    [("a ROB on grass", {0, 1, 2}), ("TEA", {3, 4}), ("TEA, ROB", {0, 1, 2, 3, 4}), ("a dog", set())],
)
def test_tokens_get_gradients_from_their_own_captions_alone(caption, moved, lab, create):
    method = create("inversion", concepts=TWO, token_std_penalty=0.0)
    (group,) = method.attach(lab.family)
    torch.autograd.backward(lab.predict(method.words([caption])[0]).square().mean() + 0 * group.parameters[0].sum())
    for rows in group.parameters:
        gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
        assert {i for i, row in enumerate(gradient) if row.abs().max() > 0} == moved


def test_a_dropped_caption_reaches_no_token(lab, create, two, settings):
    from trainer.step import TrainStep

    method = create("inversion", concepts=TWO, token_std_penalty=0.0)
    cached = cache.build(lab.family, two, [], lambda *_: None, method)
    (group,) = method.attach(lab.family)
    step = TrainStep(lab.family, method, cached, method.settings)
    encoded = step.conditioning(["", "a ROB", ""])
    torch.stack([value[::2].sum() for value in encoded.values()]).sum().backward()
    assert all(rows.grad is None or not rows.grad.any() for rows in group.parameters)


@SD_ONLY
def test_detach_gives_the_base_back(lab, create):
    before = lab.snapshot()
    method = create("pivotal", concepts=TWO, class_word="")
    lab.caption = BOTH
    lab.train(method)
    method.detach(lab.family)
    lab.assert_unchanged(before)


def test_an_archive_of_two_draws_as_the_model_that_was_trained(trained, lab, tiny_model):
    folder = trained("pivotal")
    manifest = artifact.read_manifest(folder)
    assert manifest.special_params == {"ROB": "<s0><s1><s2>", "TEA": "<s3><s4>"}
    assert [one.class_word for one in manifest.words] == ["dog", "cat"]
    assert (manifest.trigger_word, manifest.title) == ("ROB", "ROB and TEA")
    rows = load_file(folder / artifact.EMBEDDINGS)
    assert {len(value) for value in rows.values()} == {5}
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    prompt = "ROB before a TEA"
    same = "<s0><s1><s2> before a <s3><s4>"
    assert (drawn(generator, prompt) == drawn(generator, same)).all()
    assert (drawn(generator, "ROB") != drawn(generator, "TEA")).any()
    # at token_scale 0 each word is read as its own class word
    assert (drawn(generator, prompt, token_scale=0.0) == drawn(generator, "dog before a cat")).all()


def test_what_was_trained_is_what_is_loaded(train_variant, lab, two, create):
    lab.caption = BOTH
    folder, method = train_variant("pivotal", concepts=TWO, class_word="")
    with torch.no_grad():
        expected = lab.predict(method.words([BOTH])[0])
    method.detach(lab.family)
    again = create("pivotal", concepts=TWO, class_word="")
    again.load(folder, lab.family)
    with torch.no_grad():
        assert torch.equal(lab.predict(again.words([BOTH])[0]), expected)


def test_of_lora_the_words_stay_words(trained, lab, tiny_model):
    manifest = artifact.read_manifest(folder := trained("lora"))
    assert manifest.special_params == {} and manifest.tokens == () and manifest.called == "ROB and TEA"
    assert [(one.trigger_word, one.class_word) for one in manifest.words] == [("ROB", "dog"), ("TEA", "cat")]
    generator = Generator(str(tiny_model), "cpu")
    before = drawn(generator, "ROB before a TEA")
    generator.use(folder)
    assert generator.words([BOTH]) == [BOTH] and (drawn(generator, "ROB before a TEA") != before).any()


def test_the_reader_of_captions_looks_for_the_words_that_a_caption_holds(lab, create):
    method = create("inversion", concepts=TWO, class_word="")
    method.attach(lab.family)
    read = preflight.reader_of(lab.family, method, ["ROB", "TEA"])
    limit = lab.family.text[0].tokenizer.model_max_length
    assert read("a TEA").trigger_kept and read("TEA, ROB").trigger_kept
    long = read("TEA " + "a " * limit + "ROB")  # the one is read, the other cut off
    assert not long.trigger_kept and "<s0><s1><s2>" in long.cut


def test_manifests_of_one_concept_are_read_as_ever(trained):
    folder = trained("inversion")
    stored = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    stored |= {"trigger_word": "TOK", "tokens": ["<s0>", "<s1>"], "class_word": "robot"}
    del stored["concepts"], stored["settings"]["concepts"]
    old = Manifest.model_validate(stored)
    assert [one.model_dump() for one in old.words] == [
        {"trigger_word": "TOK", "tokens": ("<s0>", "<s1>"), "class_word": "robot"}
    ]
    assert old.special_params == {"TOK": "<s0><s1>"} and old.called == "<s0><s1>"


def test_other_programs_get_an_embedding_of_each(trained, lab, tmp_path):
    folder = trained("pivotal")
    rows = load_file(folder / artifact.EMBEDDINGS)
    files = {path.stem: load_file(path) for path in (folder / "comfyui/embeddings").iterdir()}
    bundle = load_file(folder / "comfyui/adapter_with_embeddings.safetensors")
    assert set(files) == {"ROB", "TEA"}
    for name, part in (("ROB", slice(0, 3)), ("TEA", slice(3, 5))):
        expected = [value[part] for _, value in sorted(rows.items())]
        inside = [value for key, value in sorted(bundle.items()) if key.startswith(f"bundle_emb.{name}.")]
        for found in ([value for _, value in sorted(files[name].items())], inside):
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    _, header = artifact.load_tensors(folder / "comfyui/embeddings/TEA.safetensors")
    assert header["modelspec.trigger_phrase"] == "TEA"
    _, header = artifact.load_tensors(folder / "comfyui/adapter.safetensors")
    assert header["modelspec.trigger_phrase"] == "ROB, TEA"
    settings = export.ExportSettings(weights=str(folder), out=tmp_path / "diffusers", format="diffusers")
    export.export(settings)
    for name, part in (("ROB", slice(0, 3)), ("TEA", slice(3, 5))):
        exported = load_file(tmp_path / f"diffusers/learned_embeds_{name}.safetensors")
        if len(rows) == 1:
            assert list(exported) == [name.lower()]
        assert {len(value) for value in exported.values()} == {part.stop - part.start}


def test_embeddings_whose_words_make_one_name_are_kept_apart(trained):
    manifest = artifact.read_manifest(trained("inversion"))
    words = [manifest.words[0].model_copy(update={"trigger_word": word}) for word in ("a:", "a;", "b")]
    assert ui_files.embedding_names(manifest.model_copy(update={"concepts": words})) == {
        "a:": "a_",
        "a;": "a__2",
        "b": "b",
    }


@SD_ONLY
def test_merged_models_know_both_words(trained, tmp_path, tiny_model):
    import diffusers

    folder = trained("pivotal")
    told = export.export(export.ExportSettings(weights=str(folder), out=tmp_path / "merged", merge=True))
    assert 'ROB and TEA"' in told[-1]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    mine = generator.family.encode_text(generator.words(["ROB before TEA"]))["context"]
    stock, _ = pipe.encode_prompt("ROB before TEA", "cpu", 1, False)
    torch.testing.assert_close(stock, mine, atol=1e-5, rtol=1e-4)


@SD_ONLY
def test_special_params_of_several_words_are_read(trained, lab, tiny_model, tmp_path):
    ours = trained("inversion")
    rows = load_file(ours / artifact.EMBEDDINGS)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file({"text_encoders_0": rows["clip_l"]}, theirs / "embeddings.safetensors")
    (theirs / foreign.SPECIAL).write_text(json.dumps({"TEA": "<s3><s4>", "ROB": "<s0><s1><s2>"}))
    generator = Generator(str(tiny_model), "cpu")
    generator.use(ours)
    expected = drawn(generator, "ROB before a TEA")
    generator.use(theirs)
    assert generator.manifests[0].special_params == {"ROB": "<s0><s1><s2>", "TEA": "<s3><s4>"}
    assert (drawn(generator, "ROB before a TEA") == expected).all()
    (theirs / foreign.SPECIAL).write_text(json.dumps({"TEA": "<s3>", "ROB": "<s0><s1><s2>"}))
    with pytest.raises(UserError, match="there are 5 tokens"):
        generator.use(theirs)


def test_weights_are_honoured_and_a_stopped_run_goes_on_to_the_bit(two, train_on, settings, tmp_path, monkeypatch):
    changes = {"concepts": TWO, "class_word": "", "max_train_steps": 8, "checkpoint_every": 3}
    seen: Counter[int] = Counter()
    make = loop.BatchMaker.make

    def made(self, step, indices, *rest):
        if isinstance(step, int):
            seen.update(two.items[i].concept for i in indices)
        return make(self, step, indices, *rest)

    monkeypatch.setattr(loop.BatchMaker, "make", made)
    whole = train_on(settings(**changes, output_dir=tmp_path / "whole"), two)
    assert seen == {0: 4, 1: 12}  # 1 to 3, though there are three pictures of the one and one of the other

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 5:
            raise Stop

    parts = {"output_dir": tmp_path / "parts"}
    with pytest.raises(Stop):
        train_on(settings(**changes, **parts), two, stop)
    again = train_on(settings(**changes, **parts, resume=True), two)
    assert again.losses == whole.losses
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(value, again.tensors[key]) for key, value in whole.tensors.items())


@pytest.mark.parametrize("method", ["pivotal", pytest.param("lora", marks=pytest.mark.slow)])
def test_one_concept_named_as_such_trains_to_the_bit_as_without(method, dataset, train_on, settings, tmp_path):
    changes = {"method": method, "class_word": "dog", "max_train_steps": 3}
    plain = train_on(settings(**changes, output_dir=tmp_path / "plain"), dataset)
    concepts = (Concept(trigger_word="TOK", class_word="dog"),)
    items = tuple(item.model_copy(update={"concept": 0}) for item in dataset.items)
    named = dataset.model_copy(update={"concepts": concepts, "items": items})
    changes |= {"class_word": "", "concepts": concepts, "output_dir": tmp_path / "named"}
    found = train_on(settings(**changes), named)
    assert found.losses == plain.losses and found.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(value, found.tensors[key]) for key, value in plain.tensors.items())


def test_preservation_reads_class_words_in_place_of_every_trigger(two, create):
    method = create("pivotal", concepts=TWO, class_word="", preservation_weight=1.0)
    prompts = preserved_prompts(method.settings, method, two)
    assert prompts == tuple(f"a photo of {word} number {i}" for i, word in enumerate(("dog", "dog", "dog", "cat")))


def test_settings_go_through_recipes_and_back(tmp_path, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "input_images: x\nmethod: pivotal\nn_tokens: 3\n"
        "concepts:\n- {trigger_word: ROB, n_tokens: 2, weight: 2}\n- pots\n"
    )
    parser = build_parser(JobSettings, "train.py", "", recipe=True)
    chosen = read(parser, JobSettings, [str(recipe)])
    assert [(one.folder, one.trigger_word, one.n_tokens, one.weight) for one in chosen.concepts] == [
        ("ROB", "ROB", 2, 2.0),
        ("pots", "pots", None, 1.0),
    ]
    assert token_names(chosen) == {"ROB": ("<s0>", "<s1>"), "pots": ("<s2>", "<s3>", "<s4>")}
    recipe.write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    assert read(parser, JobSettings, [str(recipe)]) == chosen
    flags = ["--input_images", "x", "--concepts", json.dumps(ROB), "pots"]
    assert [one.trigger_word for one in read(parser, JobSettings, flags).concepts] == ["ROB", "pots"]
    for method in ("full", "condition", "prefix"):
        with pytest.raises(UserError, match="concepts go with method pivotal, textual_inversion or lora"):
            read(parser, JobSettings, [*flags, "--method", method])


@SD_ONLY
def test_a_training_starts_from_weights_of_the_same_words_alone(trained, lab, settings):
    folder = trained("inversion")
    begun = start.Start(folder, artifact.read_manifest(folder), "x", "0")
    same = settings(method="textual_inversion", concepts=TWO)
    assert start.agreed(same, begun, lab.family).concepts == same.concepts
    open_counts = settings(method="textual_inversion", concepts=(ROB, TEA | {"n_tokens": 2}), n_tokens=None)
    assert start.agreed(open_counts, begun, lab.family).n_tokens == 3  # the usual, weights of two counts say nothing
    for other in ((TEA, ROB), (ROB,), (), (ROB, TEA | {"n_tokens": 4})):
        with pytest.raises(UserError, match=r"teaches ROB \(3 tokens\), TEA \(2 tokens\): give concepts"):
            start.agreed(settings(method="textual_inversion", concepts=other), begun, lab.family)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A zip of two folders with three pictures each."""
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for folder, level in (("ROB robot", 40), ("TEA", 200)):
            for i in range(3):
                packed = io.BytesIO()
                Image.new("RGB", (32, 32), (level, 60 * i, 90)).save(packed, "PNG")
                archive.writestr(f"data/{folder}/{i}.png", packed.getvalue())
    return path


def test_a_zip_of_folders_becomes_one_archive_of_both(folders, settings, tmp_path):
    few = {"preview_seeds": (3,), "max_train_steps": 2, "preview_prompts": ("a {trigger}", "ROB and TEA")}
    result = job.train(settings(input_images=folders, concepts="folders", **few))
    with tarfile.open(result.archive) as tar:
        names = tar.getnames()
        config = yaml.safe_load(tar.extractfile("config.yaml"))
        manifest = Manifest.model_validate_json(tar.extractfile("manifest.json").read())
        card = tar.extractfile("README.md").read().decode()
    assert manifest.special_params == {"ROB": "<s0><s1>", "TEA": "<s2><s3>"}
    assert [one["folder"] for one in config["concepts"]] == ["data/ROB robot", "data/TEA"]
    assert {"comfyui/embeddings/ROB.safetensors", "comfyui/embeddings/TEA.safetensors"} <= set(names)
    assert "The trigger words are **ROB**, a robot, and **TEA**." in card and "a photo of <s0><s1> and <s2><s3>" in card
    page = result.report.read_text(encoding="utf-8")
    assert set(result.summary.by_concept) == {"ROB", "TEA"}
    (sentence,) = (one for one in result.summary.sentences() if one.startswith("Of that"))
    assert "ROB " in sentence and "TEA " in sentence and sentence in page
    for told in ("<h1>ROB and TEA</h1>", "a ROB", "a TEA", "data/ROB robot", "50 %", "&lt;s2&gt;&lt;s3&gt;"):
        assert told in page, told
    assert len(result.samples) == 3
