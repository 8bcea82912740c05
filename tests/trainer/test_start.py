"""Training that starts from given weights: exactly there, whatever their format; what does not agree is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from preprocessing.errors import UserError
from trainer import artifact, job, methods, start
from trainer.config import JobSettings
from trainer.generate import Generator

SLOW = pytest.mark.slow
SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
STILL = {"learning_rate": 0.0, "text_embedding_lr": 0.0, "max_train_steps": 2, "lora_rank": None, "lora_targets": None}


@pytest.fixture
def go_on(train_variant, train_on, dataset, lab, settings, tmp_path) -> Callable[..., Any]:
    """Trains a variant a little, then runs the job from one of its files ("tar": packed; None: its folder)."""

    def run(variant: str, member: str | None = None, **changes: Any) -> tuple[Path, Any, JobSettings]:
        folder, method = train_variant(variant)
        method.detach(lab.family)
        own = {k: getattr(method.settings, k) for k in ("method", "base_model", "use_dora", "train_text_encoder")}
        source = folder if member is None else folder.with_suffix(".tar") if member == "tar" else folder / member
        if member == "tar":
            artifact.write(folder, source)
        shutil.rmtree(method.settings.output_dir)
        chosen = settings(**(own | STILL | {"init_adapter": str(source), "output_dir": tmp_path / "on"} | changes))
        return folder, train_on(job.fill(chosen), dataset), chosen

    return run


def same_adapter(weights: Path, folder: Path) -> None:
    """The weights are those in `folder`, to the bit."""
    for name in (artifact.ADAPTER, artifact.EMBEDDINGS):
        if (folder / name).exists():
            expected, found = load_file(folder / name), load_file(weights / name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize(
    "variant", ["pivotal dora", "lora text", "full", *(pytest.param(v, marks=SLOW) for v in ("pivotal", "inversion"))]
)
@SD_ONLY
def test_at_learning_rate_zero_the_result_is_the_start(variant, go_on) -> None:
    folder, trained, _ = go_on(variant)
    same_adapter(trained.weights, folder)
    manifest, before = artifact.read_manifest(trained.weights), artifact.read_manifest(folder)
    assert manifest.started_from["init_adapter"] == str(folder) and len(manifest.started_from["sha256"]) == 64
    assert {net: one["lora_alpha"] for net, one in manifest.nets.items()} == {
        net: one["lora_alpha"] for net, one in before.nets.items()
    }
    if before.nets:
        assert manifest.settings["lora_rank"] == 4
        assert manifest.settings["lora_alpha"] == before.nets["unet"]["lora_alpha"]
    Generator(before.base_model, "cpu").use(trained.weights)  # and it is a whole archive


@pytest.mark.parametrize("tiny_model", ["xl"], indirect=True)
@pytest.mark.parametrize("member", ["comfyui/adapter_with_embeddings.safetensors", pytest.param("tar", marks=SLOW)])
def test_foreign_files_and_archives_are_starts_too(member, go_on) -> None:
    folder, trained, _ = go_on("pivotal", member)
    same_adapter(trained.weights, folder)


@SD_ONLY
def test_it_goes_on_learning_from_there(go_on) -> None:
    """The first loss is the start's own, and not the base model's; the weights move."""
    _, first, _ = go_on("lora", learning_rate=0.0, max_train_steps=1)
    folder, second, _ = go_on("lora", learning_rate=1e-2, max_train_steps=3)
    assert second.losses[0] == first.losses[0]
    moved, before = second.tensors, load_file(folder / artifact.ADAPTER)
    assert all(not torch.equal(moved[key], value) for key, value in before.items())


@SD_ONLY
def test_a_resumed_run_needs_the_same_start(go_on, train_on, dataset, tmp_path) -> None:
    folder, _, chosen = go_on("lora", learning_rate=1e-2, checkpoint_every=1)
    again = chosen.model_copy(update={"resume": True})
    moved = shutil.copytree(folder, tmp_path / "moved")
    train_on(job.fill(again.model_copy(update={"init_adapter": str(moved)})), dataset)
    tensors = load_file(folder / artifact.ADAPTER)
    key = sorted(tensors)[0]
    save_file(tensors | {key: tensors[key] + 1}, folder / artifact.ADAPTER)
    with pytest.raises(UserError, match="init_adapter_hash"):
        train_on(job.fill(again), dataset)


@SD_ONLY
@pytest.mark.parametrize(
    ("variant", "changes", "told"),
    [
        ("lora", {"lora_rank": 8}, "lora_rank 8 does not agree with init_adapter, which has 4"),
        ("lora", {"lora_alpha": 3.0}, "lora_alpha 3.0 does not agree"),
        ("lora", {"use_dora": True}, "use_dora True does not agree"),
        ("lora", {"lora_targets": "attention"}, "lora_targets attention does not agree"),
        ("inversion", {"n_tokens": 5}, "n_tokens 5 does not agree with init_adapter, which has 2"),
        ("pivotal", {"method": "lora"}, "use method pivotal"),
        ("lora", {"method": "textual_inversion"}, "holds nothing that method textual_inversion trains"),
        ("full", {"method": "lora"}, "--extract"),
        ("lora", {"method": "full"}, "--merge"),
        ("lora text", {"method": "pivotal", "train_text_encoder": False}, "use method lora"),
    ],
)
def test_what_does_not_agree_is_said(variant, changes, told, train_variant, settings, lab) -> None:
    folder, method = train_variant(variant)
    method.detach(lab.family)
    own = {"method": method.settings.method, "train_text_encoder": method.settings.train_text_encoder}
    chosen = settings(**(own | STILL | {"init_adapter": str(folder)} | changes))
    with pytest.raises(UserError, match=told) as caught, start.opened(chosen, lab.family) as begun:
        begins = methods.create(start.agreed(chosen, begun, lab.family))
        begins.begin_from(begun.folder)
        begins.attach(lab.family)
    assert "\n" not in str(caught.value)


@SD_ONLY
@pytest.mark.parametrize(("variant", "expected"), [("inversion", 2), ("lora", 3)])
def test_the_number_of_tokens_is_that_of_the_weights(variant, expected, train_variant, settings, lab) -> None:
    folder, method = train_variant(variant)
    method.detach(lab.family)
    chosen = settings(**STILL | {"method": "pivotal", "init_adapter": str(folder), "n_tokens": None})
    with start.opened(chosen, lab.family) as begun:
        assert start.agreed(job.fill(chosen), begun, lab.family).n_tokens == expected


@SLOW
@SD_ONLY
def test_agreeing_settings_are_no_mistake(go_on) -> None:
    folder, trained, _ = go_on("lora", lora_rank=4, lora_alpha=2.0, lora_targets="all")
    same_adapter(trained.weights, folder)


@SD_ONLY
def test_pivotal_may_start_from_tokens_alone(go_on) -> None:
    folder, trained, _ = go_on("inversion", method="pivotal")
    expected, found = (load_file(one / artifact.EMBEDDINGS) for one in (folder, trained.weights))
    assert torch.equal(expected["clip_l"], found["clip_l"])
    assert (trained.weights / artifact.ADAPTER).exists()


def test_another_family_is_refused(train_variant, tiny_sd, tiny_xl, tiny_model, settings) -> None:
    folder = train_variant("lora")[0]
    other = tiny_xl if tiny_model == tiny_sd else tiny_sd
    chosen = settings(init_adapter=str(folder), base_model=str(other))
    generator = Generator(str(other), "cpu")
    with pytest.raises(UserError, match="weights of the same family"), start.opened(chosen, generator.family):
        pass


def test_weights_that_are_none_are_told_before_anything_is_prepared(settings, tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04")
    for source in ("no/such/file.safetensors.x", str(tmp_path / "x.safetensors")):
        with pytest.raises(UserError):
            job.fill(settings(init_adapter=source))
