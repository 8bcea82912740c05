"""The command line: flags, help, recipes, mistakes, exit codes; and what the doors do with their settings."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import predict
import train
from preprocessing.errors import UserError
from trainer import commandline
from trainer.config import JobSettings

DOORS = {"train.py": JobSettings, "predict.py": predict.CommandSettings}


def read(*argv: str) -> JobSettings:
    parser = commandline.build_parser(JobSettings, "train.py", "", recipe=True)
    return commandline.read(parser, JobSettings, list(argv))


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def run_door(door: str, root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, door, *argv], cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("door", DOORS)
def test_help_is_quick_and_complete(door: str, root: Path) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = run_door(door, root, "--help")
    assert done.returncode == 0
    assert spent() - before < 2
    shown = " ".join(done.stdout.split())
    for name, field in DOORS[door].model_fields.items():
        assert f"--{name} " in shown
        assert " ".join(field.description.split()) in shown
    assert shown.count("(default: ") + shown.count("(required)") == len(DOORS[door].model_fields)


def test_help_shows_choices_and_groups() -> None:
    text = " ".join(commandline.build_parser(JobSettings, "train.py", "").format_help().split())
    assert "{pivotal,lora,textual_inversion,full,condition,prefix,perfusion}" in text
    assert "(default: 0 1)" in text  # a tuple as one would type it
    places = [
        text.index(title) for title in ("How the base model is adapted", "How the trainable", "What is minimised")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("door", DOORS)
def test_parser_needs_no_heavy_library(door: str, root: Path) -> None:
    module = door.removesuffix(".py")
    code = (
        f"import sys, {module}\nfrom trainer import commandline\n"
        "try: commandline.run(lambda _: " + module + ".main(['--nonsense']))\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
    assert "--nonsense" in done.stderr


def test_flags_alone() -> None:
    settings = read(
        "--input_images", "a.zip", "--max_train_steps", "7", "--learning_rate", "1e-4", "--class_word", "dog"
    )
    assert settings == JobSettings(input_images="a.zip", max_train_steps=7, learning_rate=1e-4, class_word="dog")
    assert settings.input_images == Path("a.zip")  # relative to where one stands


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, "input_images: pics.zip\nmax_train_steps: 400\nseed: 3\nresume: true\n")
    settings = read(path, "--max_train_steps", "50", "--resume", "false")
    assert settings == JobSettings(input_images="pics.zip", max_train_steps=50, seed=3)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resume"], {"resume": True}),
        (["--resume", "true"], {"resume": True}),
        (["--resume=false"], {"resume": False}),
        (["--preview_prompts", "a, b", "c"], {"preview_prompts": ("a, b", "c")}),
        (["--preview_prompts", "null"], {"preview_prompts": None}),
        (["--preview_prompts", "null", "a"], {"preview_prompts": ("null", "a")}),
        (["--preview_prompts"], {"preview_prompts": ()}),
        (["--preview_seeds", "4", "0", "4"], {"preview_seeds": (4, 0, 4)}),
        (["--snr_gamma", "null"], {"snr_gamma": None}),
        (["--seed", "0"], {"seed": 0}),
        (["--trigger_word", "null"], {"trigger_word": "null"}),  # a setting that cannot be null
        (["--output_dir", "a b/ü"], {"output_dir": Path("a b/ü")}),
    ],
)
def test_values_of_flags(argv: list[str], expected: dict[str, object]) -> None:
    assert read("--input_images", "a", *argv) == JobSettings(input_images="a", **expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),  # YAML 1.1 calls this a string
        ("mixed_precision: no", {"mixed_precision": "no"}),  # and this a boolean
        ("trigger_word: 123", {"trigger_word": "123"}),
        ("resume: yes", {"resume": True}),
        ("snr_gamma: null", {"snr_gamma": None}),
        ("snr_gamma: ~", {"snr_gamma": None}),
        ("snr_gamma:", {"snr_gamma": None}),
        ("report_to: none", {"report_to": "none"}),
        ("preview_prompts: [a, 'null']", {"preview_prompts": ("a", "null")}),
        ("preview_seeds:\n  - 1\n  - 2", {"preview_seeds": (1, 2)}),
        ("# nothing", {}),
    ],
)
def test_values_of_recipes(tmp_path: Path, line: str, expected: dict[str, object]) -> None:
    assert read(recipe(tmp_path, line), "--input_images", "a") == JobSettings(input_images="a", **expected)


def test_recipe_of_every_setting_round_trips(tmp_path: Path) -> None:
    settings = JobSettings(
        input_images="a.zip",
        snr_gamma=None,
        mixed_precision="no",
        preview_prompts=("x: y", "- z", "ü"),
        ema_decay=0.999,
    )
    text = yaml.safe_dump(settings.model_dump(mode="json"), allow_unicode=True)
    assert read(recipe(tmp_path, text)) == settings


def test_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JobSettings.model_fields:
        monkeypatch.setenv(name, "5")
        monkeypatch.setenv(name.upper(), "5")
    assert read("--input_images", "a") == JobSettings(input_images="a")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--max_train_stpes", "5"], ["--max_train_stpes is no setting", "did you mean --max_train_steps?"]),
        (["--max-train-steps=5"], ["did you mean --max_train_steps?"]),
        (["--zzzz"], ["--zzzz is no setting", "--help"]),
        (["--max_train", "5"], ["--max_train is no setting"]),  # no abbreviations: they change with every new setting
        (["--max_train_steps", "many"], ["--max_train_steps", "integer", "'many'"]),
        (["--max_train_steps", "0"], ["--max_train_steps", "greater than or equal to 1", "'0'"]),
        (["--max_train_steps", "2.5"], ["--max_train_steps", "integer"]),
        (["--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["--seed", "9" * 5000], ["--seed"]),
        (["--learning_rate", "nan"], ["--learning_rate", "finite"]),
        (["--learning_rate"], ["--learning_rate", "expected one argument"]),
        (["--method", "lorra"], ["--method", "'pivotal'", "'lorra'"]),
        (["--resume", "perhaps"], ["--resume", "boolean"]),
        (["--preview_seeds", "1", "x"], ["--preview_seeds", "integer", "'x'"]),
        (["--preview_seeds"], ["--preview_seeds", "at least 1"]),
        (["--trigger_word", "a b"], ["--trigger_word", "'a b'"]),
        (["--use_dora", "--method", "full"], ["use_dora goes with"]),
        (["one.yaml", "two.yaml"], ["'two.yaml' is not understood"]),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], told: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read("--input_images", "a", *argv)
    message = str(error.value)
    assert all(part in message for part in told), message
    assert "\n" not in message and len(message) < 300


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"--seed .*--max_train_steps |--max_train_steps .*--seed ") as error:
        read("--seed", "x", "--max_train_steps", "y")
    assert "input_images is missing: give --input_images PATH" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_train_stpes: 5", "max_train_stpes is no setting; did you mean max_train_steps?"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("seed: [1", "line 1"),
        ("seed: true", "seed should be a valid integer"),
        ("seed: {a: 1}", "seed should be a valid integer"),
        ("seed: !!python/object/apply:os.getpid []", "seed should be a valid integer"),
        ("preview_prompts: one", "preview_prompts should be a valid tuple"),
        ("? [a, b]\n: c", "unhashable"),
        ("- a\n- b", "name: value"),
        ("just words", "name: value"),
        ("a: \x00", "recipe.yaml"),
    ],
)
def test_mistakes_in_recipes_name_the_file(tmp_path: Path, text: str, told: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(UserError) as error:
        read(path, "--input_images", "a")
    assert path in str(error.value) and told in str(error.value)


def test_unreadable_recipes(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(str(path))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"binary\.yaml"):
        read(str(tmp_path / "binary.yaml"))


def test_settings_from_python_are_checked_alike() -> None:
    with pytest.raises(UserError, match="sede is no setting; did you mean seed"):
        commandline.check(JobSettings, {"input_images": "a", "sede": 1})
    with pytest.raises(UserError, match=r"^lora_rank should be greater"):
        commandline.check(JobSettings, {"input_images": "a", "lora_rank": 0})


@pytest.mark.parametrize("door", DOORS)
def test_exit_code_2_without_traceback(door: str, root: Path) -> None:
    done = run_door(door, root, "--sede", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --sede is no setting; did you mean --seed?\n"


def test_missing_pictures_are_one_line_too(root: Path, tmp_path: Path) -> None:
    # all the libraries are loaded by then: none of them may add to it
    done = run_door("train.py", root, "--input_images", "nowhere.zip", "--output_dir", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: input_images nowhere.zip does not exist") and done.stderr.count("\n") == 1


def test_demo_script_refuses_a_sprite_that_is_not_there(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(["sh", str(root / "test_train.sh"), "no.png"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no.png does not exist: give the path of an RGBA PNG\n")


def test_how_a_door_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def door(ending: BaseException | None):
        def call(argv: list[str]) -> None:
            assert argv == ["--a"]
            if ending:
                raise ending

        return call

    monkeypatch.setattr(sys, "argv", ["train.py", "--a"])
    assert commandline.run(door(None)) == 0
    assert commandline.run(door(UserError("two\nlines"))) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert commandline.run(door(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        commandline.run(door(ZeroDivisionError()))


def test_recipes_are_settings(root: Path) -> None:
    paths = sorted((root / "recipes").glob("*.yaml"))
    assert {path.stem for path in paths} >= {"toybox_pivotal", "toybox_lora", "sd15_pivotal", "sdxl_pivotal"}
    for path in paths:
        settings = read(str(path), *([] if "toybox" in path.stem else ["--input_images", "a.zip"]))
        assert settings.output_dir == Path("outputs") / path.stem
        # a half of Kandinsky without more is that half trained fully
        plain = ("kandinsky22_decoder", "kandinsky22_prior", "flux_kontext")
        named = path.stem.endswith(settings.method) or path.stem in plain or path.stem.startswith("pixel_ar_")
        assert settings.method == "condition" or named
        if "toybox" in path.stem and settings.source != "toybox":  # which is drawn
            assert (root / settings.input_images).is_file()


def test_train_prints_where_the_result_lies(fake_job, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--input_images", "a.zip", "--output_dir", str(fake_job.folder)])
    assert fake_job.settings == [JobSettings(input_images="a.zip", output_dir=fake_job.folder)]
    assert str(fake_job.folder / "trained_model.tar") in capsys.readouterr().out
