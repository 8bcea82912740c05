"""The door to drawing over a stand-in for the generator: weights, bases, files, downloads."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import predict
from predict import Wanted
from preprocessing.errors import UserError
from trainer.drawing import DrawSettings


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "mine.tar"
    path.write_bytes(b"weights")
    return path


def test_pictures_and_seed_are_told(generator_calls: list[Any], tmp_path: Path, weights: Path, capsys) -> None:
    out = tmp_path / "out"
    predict.main(
        ["--weights", f"{weights}", "--prompt", "TOK", "--num_outputs", "2", "--seed", "7", "--output_dir", f"{out}"]
    )
    assert generator_calls[0] == ("base", "base of mine")
    assert generator_calls[-2:] == [("use", weights), DrawSettings(prompt="TOK", num_outputs=2, seed=7)]
    files = [out / "0001_seed7.png", out / "0002_seed8.png"]
    assert capsys.readouterr().out.splitlines() == ["seed: 7", *map(str, files)]
    with Image.open(files[1]) as picture:
        assert picture.getpixel((0, 0)) == (8, 0, 0)
        told = json.loads(picture.text["atelier"])
    # What is written in a picture draws it again.
    again = predict.PredictSettings(**told)
    assert (again.prompt, again.seed, again.num_outputs, again.weights) == ("TOK", 8, 1, str(weights))


def test_pictures_are_never_overwritten(generator_calls: list[Any], tmp_path: Path) -> None:
    argv = ["--prompt", "a", "--seed", "1", "--output_dir", str(tmp_path)]
    predict.main(argv)
    predict.main(argv)
    (tmp_path / "0001_seed1.png").unlink()
    predict.main([*argv, "--num_outputs", "2"])
    assert [path.name[:4] for path in sorted(tmp_path.iterdir())] == ["0002", "0003", "0004"]


def test_seed_that_was_not_given_is_told(generator_calls: list[Any], tmp_path: Path, capsys) -> None:
    predict.main(["--prompt", "a", "--output_dir", str(tmp_path)])
    assert generator_calls[-1].seed == 99
    assert capsys.readouterr().out.splitlines() == ["seed: 99", str(tmp_path / "0001_seed99.png")]


def test_base_and_weights_are_loaded_once(generator_calls: list[Any], weights: Path, tmp_path: Path) -> None:
    studio = predict.Studio()
    studio.ready(Wanted(str(weights), None))
    studio.ready(Wanted(str(weights), None))
    assert generator_calls == [("base", "base of mine"), ("use", weights)]
    generator_calls.clear()
    studio.ready(Wanted(None, "base of mine"))  # without weights: the same base as it was
    assert generator_calls == ["release"]
    generator_calls.clear()
    studio.ready(Wanted(None, None))
    assert generator_calls == [("base", "toybox"), "release"]
    generator_calls.clear()
    studio.ready(Wanted(str(weights), "toybox"))  # opened once more, on the base that is loaded
    assert generator_calls == [("use", weights)]
    generator_calls.clear()
    studio.ready(Wanted(str(weights), "another"))
    assert generator_calls == [("base", "another"), ("use", weights)]


def test_weights_that_changed_on_disk_are_loaded_again(generator_calls: list[Any], weights: Path) -> None:
    studio = predict.Studio()
    studio.ready(Wanted(str(weights), None))
    other = weights.with_name("other.tar")
    other.write_bytes(b"newer weights")
    other.replace(weights)
    generator_calls.clear()
    studio.ready(Wanted(str(weights), None))
    assert generator_calls == [("use", weights)]


def test_after_broken_weights_those_before_are_in(generator_calls: list[Any], weights: Path) -> None:
    broken = weights.with_name("broken.tar")
    broken.write_bytes(b"broken")
    studio = predict.Studio()
    studio.ready(Wanted(str(weights), "toybox"))
    with pytest.raises(ValueError, match="broken weights"):
        studio.ready(Wanted(str(broken), "toybox"))
    generator_calls.clear()
    studio.ready(Wanted(str(weights), "toybox"))
    assert generator_calls == []  # the generator put them back by itself
    assert list(studio.opened) == [weights]


def test_a_wrong_base_is_told_before_the_old_one_goes(generator_calls: list[Any], weights: Path) -> None:
    studio = predict.Studio()
    studio.ready(Wanted(str(weights), None))
    generator_calls.clear()
    with pytest.raises(ValueError, match="no such base"):
        studio.ready(Wanted(None, "nonsense"))
    studio.ready(Wanted(str(weights), None))
    assert generator_calls == []


def test_weights_that_name_no_base_are_for_the_default_one(generator_calls: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    path.write_bytes(b"weights")
    predict.Studio().ready(Wanted(str(path), None))
    assert generator_calls[0] == ("base", "toybox")


def test_given_base_wins(generator_calls: list[Any], weights: Path) -> None:
    predict.Studio().ready(Wanted(str(weights), "another"))
    assert generator_calls[0] == ("base", "another")


@pytest.mark.parametrize("flags", [["--weights"], ["--image"], ["--image", "{weights}", "--mask"]])
def test_missing_files_are_told_before_a_model_is_loaded(
    flags: list[str], generator_calls: list[Any], weights: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.x do(es)? not exist"):
        predict.main(["--prompt", "a", *(flag.format(weights=weights) for flag in flags), "nowhere.x"])
    assert generator_calls == []


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "prompt is missing: give --prompt TEXT"),
        (["--prompt", "a", "--num_outputs", "0"], "--num_outputs"),
        (["--prompt", "a", "--prompt_strength", "1.5"], "--prompt_strength"),
        (["--prompt", "a", "--scheduler", "eulr"], "--scheduler"),
        (["--prompt", "a", "--mask", "m.png"], "give image too"),
        (["recipe.yaml", "--prompt", "a"], "'recipe.yaml' is not understood"),
    ],
)
def test_mistakes(argv: list[str], told: str, generator_calls: list[Any]) -> None:
    with pytest.raises(UserError, match=told):
        predict.main(argv)
    assert generator_calls == []


@pytest.mark.parametrize("flags", [[], ["--prompt", ""]])
def test_a_condition_needs_no_prompt(flags: list[str], generator_calls: list[Any], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    predict.main([*flags, "--condition", str(tmp_path / "edges.png"), "--output_dir", str(tmp_path / "out")])
    assert generator_calls[-1].prompt == ""


def test_cog_predictor(generator_calls: list[Any], weights: Path, capsys) -> None:
    predictor = predict.Predictor()
    predictor.setup(weights=str(weights))
    assert generator_calls[0] == ("base", "base of mine")
    given = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    files = predictor.run(**given | {"prompt": "TOK", "num_outputs": 2, "seed": 3, "lora_scale": 0.5})
    assert generator_calls[-1] == DrawSettings(prompt="TOK", num_outputs=2, seed=3, lora_scale=0.5)
    assert [file.name for file in files] == ["0001_seed3.png", "0002_seed4.png"]
    assert [file.is_file() for file in files] == [True, True]
    assert capsys.readouterr().out == "seed: 3\n"
    with pytest.raises(UserError) as told:
        predictor.run(**given | {"prompt": "TOK", "replicate_weights": "nowhere?token=abc " + "x" * 10_000})
    assert len(str(told.value)) <= 300 and "abc" not in str(told.value)


def test_pictures_that_were_sent_are_removed(generator_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predict.Predictor()
    predictor.setup()
    given = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    (first,) = predictor.run(**given | {"prompt": "a", "seed": 1})
    (second,) = predictor.run(**given | {"prompt": "a", "seed": 1})
    assert first.is_file() and second.is_file() and first != second  # the first may still be on its way
    monkeypatch.setattr(predict, "SENT_BY_NOW", -1)
    (third,) = predictor.run(**given | {"prompt": "a", "seed": 1})
    assert third.is_file() and not first.parent.exists() and not second.parent.exists()


def test_a_picture_does_not_tell_the_secret_in_its_weights_address(generator_calls: list[Any], tmp_path: Path) -> None:
    address = "https://me:pw@127.0.0.1/x.tar?token=abc"
    settings = predict.PredictSettings(prompt="a", seed=1, weights=address, output_dir=tmp_path)
    (file,) = predict.written([Image.new("RGB", (8, 8))], settings)
    with Image.open(file) as picture:
        told = json.loads(picture.text["atelier"])
    assert told["weights"] == "https://127.0.0.1/x.tar"
    assert "output_dir" not in told  # of no use to anybody else


def test_several_weights_are_used_in_their_order(generator_calls: list[Any], tmp_path: Path, weights: Path) -> None:
    more = [tmp_path / name for name in ("second.tar", "third.tar")]
    for number, path in enumerate(more):
        path.write_bytes(b"weights of another kind" + bytes([number]))
    out = ["--output_dir", str(tmp_path / "out"), "--prompt", "a", "--seed", "1"]
    given = ["--weights", str(weights), "--more_weights", *map(str, more), "--more_scales", "1", "0.5"]
    predict.main([*given, *out])
    assert generator_calls[0] == ("base", "base of mine")  # the first one's
    assert generator_calls[-2:] == [("use", weights, *more), DrawSettings(prompt="a", seed=1, more_scales=(1.0, 0.5))]
    with Image.open(tmp_path / "out" / "0001_seed1.png") as picture:
        told = json.loads(picture.text["atelier"])
    assert told["more_weights"] == [str(path) for path in more]
    with pytest.raises(UserError, match="more_scales must have as many numbers"):
        predict.main([*given, "1", *out])
    with pytest.raises(UserError, match="more_scales must be from -4 to 4"):
        predict.main([*given[:-1], "5", *out])
