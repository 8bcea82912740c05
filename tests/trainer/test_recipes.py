"""Every recipe runs from the door to the pictures, on tiny base models of its family."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import predict
import train

SLOW = {"flux_compact", "flux_feature_reuse", "flux_multi_condition", "flux_lora"}  # alike others
RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
BASES = {
    **{"toybox": "tiny_sd", "sd15": "tiny_sd", "sdxl": "tiny_xl", "flux_kontext": "tiny_kontext", "flux": "tiny_flux"},
    **{"kandinsky22_prior": "tiny_prior", "kandinsky22_decoder": "tiny_decoder", "omnigen2": "tiny_omnigen2"},
    "pixel_ar": "pixel_ar",
}
SMALL_PIXEL_AR = {"hidden_dim": 16, "num_layers": 2, "text_embed_dim": 16, "num_text_layers": 1, "text_nhead": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pictures, one of them with a caption, each with a condition."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.new("RGB", (40, 32 + 4 * i), (80 * i, 200, 40)).save(folder / f"{i}.png")
        Image.new("RGB", (40, 32 + 4 * i), (9, 80 * i, 40)).save(folder / f"{i}.condition.png")
    (folder / "1.txt").write_text("a drawing of TOK", encoding="utf-8")
    return folder


def marked(recipe: Path) -> object:
    return pytest.param(recipe, id=recipe.stem, marks=[pytest.mark.slow] if recipe.stem in SLOW else [])


@pytest.mark.parametrize("recipe", [marked(recipe) for recipe in RECIPES])
def test_recipe_trains_and_draws(recipe: Path, pictures: Path, tmp_path: Path, request, capsys) -> None:
    fixture = next(name for start, name in BASES.items() if recipe.stem.startswith(start))
    base = fixture if fixture == "pixel_ar" else request.getfixturevalue(fixture)
    out = tmp_path / "out"
    small = {"mixed_precision": "no", "num_train_epochs": "null"} | {
        **{"input_images": pictures, "base_model": base, "output_dir": out, "captioner": "none", "report_to": "none"},
        **{"resolution": 32, "max_train_steps": 2, "train_batch_size": 2, "preview_prompts": "TOK", "preview_seeds": 1},
        **{"gradient_accumulation_steps": 1, "holdout": 0},
    }
    chosen = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "condition_resolution" in chosen:
        small["condition_resolution"] = 16
    if "kandinsky" in recipe.stem:
        small["companion_model"] = request.getfixturevalue("tiny_prior" if "decoder" in recipe.stem else "tiny_decoder")
    if base == "pixel_ar":  # it is built for the job; its words are the captions'
        small |= SMALL_PIXEL_AR | {"source": "files", "mode": "captions"}
    train.main([str(recipe), *(str(word) for name, value in small.items() for word in (f"--{name}", value))])
    assert f"weights: {out / 'trained_model.tar'}" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert {"00_base.png", "00_adapted.png"} <= {path.name for path in (out / "samples").glob("*.png")}

    argv = ["--prompt", "TOK", "--seed", "1", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "drawn")]
    if tasks := chosen.get("condition_tasks"):
        argv += ["--condition", *[str(pictures / "0.png")] * len(tasks)]
    if "fill" in chosen.get("condition_tasks", ()):
        Image.linear_gradient("L").save(tmp_path / "mask.png")
        argv += ["--mask", str(tmp_path / "mask.png")]
    predict.main(["--weights", str(out / "trained_model.tar"), *argv])
    with Image.open(tmp_path / "drawn" / "0001_seed1.png") as picture:
        assert picture.size == (32, 32)


def test_config_of_a_result_runs_it_again(pictures: Path, tmp_path: Path, tiny_sd: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    argv = ["--input_images", pictures, "--base_model", tiny_sd, "--resolution", 32, "--max_train_steps", 2]
    argv += ["--train_batch_size", 2, "--captioner", "none", "--report_to", "none", "--preview_prompts", "TOK"]
    train.main([*map(str, argv), "--output_dir", str(first)])
    _unpacked(first / "trained_model.tar", "config.yaml", tmp_path / "config.yaml")
    train.main([str(tmp_path / "config.yaml"), "--output_dir", str(again)])
    for member in ("adapter.safetensors", "embeddings.safetensors", "config.yaml"):
        results = [_unpacked(out / "trained_model.tar", member, tmp_path / member) for out in (first, again)]
        if member == "config.yaml":
            results = [yaml.safe_load(text) | {"output_dir": None} for text in results]
        assert results[0] == results[1], member


def _unpacked(archive: Path, member: str, target: Path) -> bytes:
    """The bytes of one member, also written to `target`."""
    with tarfile.open(archive) as tar:
        content = tar.extractfile(member).read()
    target.write_bytes(content)
    return content
