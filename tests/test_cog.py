"""What Cog reads without running it: signatures, cog.yaml, requirements. And the Cog functions, over stand-ins."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from cog import BaseRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import predict
import train
from preprocessing.errors import UserError
from trainer.config import JobSettings

FUNCTIONS = {"train.py": "train", "predict.py": "run"}
ANNOTATIONS = re.compile(r"(Optional\[)?(str|int|float|bool|Path)\]?")
KEYWORDS = {"default", "description", "ge", "le", "choices"}
CONTAINER_KEYS = {"build", "image", "run", "train", "concurrency", "environment", "weights"}
BUILD_KEYS = {
    *("cuda", "cudnn", "gpu", "python_version", "python_requirements", "system_packages", "sdk_version", "run"),
}
REFUSED_ENVIRONMENT = re.compile(r"PATH|LD_LIBRARY_PATH|PYTHONPATH|CUDA_.*|NVIDIA_.*|HF_HUB_ENABLE_HF_TRANSFER")


def faults(source: str, name: str) -> list[str]:
    """How the signature of function `name` breaks the rules of a schema that is read from the source."""
    tree = ast.parse(source)
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    lists = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List)
    }
    spec = function.args
    found = [f"{name} takes *args, **kwargs or keywords only"] if spec.vararg or spec.kwarg or spec.kwonlyargs else []
    if ast.unparse(function.returns or ast.Constant(None)) not in ("Path", "List[Path]"):
        found.append(f"{name} returns no path")
    arguments = [one for one in spec.args if one.arg != "self"]
    if len(spec.defaults) != len(arguments):
        return [*found, f"{name} has an argument without Input"]
    for argument, default in zip(arguments, spec.defaults, strict=True):
        found += [f"{argument.arg}: {fault}" for fault in _argument_faults(argument, default, source, lists)]
    return found


def _argument_faults(argument: ast.arg, call: ast.expr, source: str, lists: dict[str, ast.List]) -> list[str]:
    annotation = ast.unparse(argument.annotation) if argument.annotation else "nothing"
    found = [] if ANNOTATIONS.fullmatch(annotation) else [f"annotated as {annotation}"]
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Input" and not call.args):
        return [*found, "its default is no Input(name=value)"]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    found += [f"{word} is not known" for word in set(given) - KEYWORDS]
    for word in {"default", "ge", "le"} & set(given):
        if not _is_literal(given[word]):
            found.append(f"{word} is computed")
    if "default" in given and ast.unparse(given["default"]) == "None" and not annotation.startswith("Optional["):
        found.append("None, but not Optional")
    if "choices" in given:
        choices = given["choices"]
        choices = lists.get(choices.id) if isinstance(choices, ast.Name) else choices
        if not (isinstance(choices, ast.List) and all(isinstance(one, ast.Constant) for one in choices.elts)):
            found.append("choices are no list of literals in this file")
    if not _is_plain_text(given.get("description"), source):
        found.append("description is not one double-quoted ASCII literal on one line")
    return found


def _is_literal(node: ast.expr) -> bool:
    """A constant that is written plainly: no 1_000, no arithmetic; -4 is one."""
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _is_plain_text(node: ast.expr | None, source: str) -> bool:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return False
    text = ast.get_source_segment(source, node) or ""
    pieces = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.STRING]
    before = source.splitlines()[node.lineno - 1].encode()[: node.col_offset].decode()
    return (
        len(pieces) == 1
        and re.fullmatch(r'"[^"\n]+"', text) is not None
        and text.isascii()
        and before.rstrip().endswith("=")  # not in parentheses
    )


def inputs(function: Any) -> dict[str, Any]:
    """name -> what Input() was given."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items() if name != "self"}


def defaults(function: Any) -> dict[str, Any]:
    """The inputs as Cog fills them in."""
    return {name: given.default for name, given in inputs(function).items()}


@pytest.mark.parametrize("door", FUNCTIONS)
def test_signatures_can_be_read_from_the_source(door: str, root: Path) -> None:
    assert faults((root / door).read_text(encoding="utf-8"), FUNCTIONS[door]) == []


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ('a: int = Input(default=None, description="x")', "not Optional"),
        ('a: int | None = Input(default=None, description="x")', "annotated as"),
        ('a: List[str] = Input(default=None, description="x")', "annotated as"),
        ('a = Input(description="x")', "annotated as nothing"),
        ('a: int = Input(default=2 * 3, description="x")', "default is computed"),
        ('a: int = Input(default=N, description="x")', "default is computed"),
        ('a: int = Input(ge=N, description="x")', "ge is computed"),
        ('a: str = Input(choices=("a", "b"), description="x")', "choices"),
        ('a: str = Input(choices=sorted(D), description="x")', "choices"),
        ('a: str = Input(choices=IMPORTED, description="x")', "choices"),
        ('a: str = Input(description="x" "y")', "description"),
        ('a: str = Input(description=("x"))', "description"),
        ('a: str = Input(description=f"x")', "description"),
        ("a: str = Input(description='x')", "description"),
        ('a: str = Input(description="é")', "description"),
        ("a: str = Input()", "description"),
        ("a: str = text()", "no Input"),
        ('a: str = Input(gt=0, description="x")', "gt is not known"),
        ("**rest: str", "**kwargs"),
        ("a: str", "without Input"),
    ],
)
def test_the_rules_see_what_cog_would_refuse(argument: str, fault: str) -> None:
    found = faults(f"def train({argument}) -> Path: ...", "train")
    assert any(fault in one for one in found), found


def test_the_rules_allow_a_list_of_the_same_file() -> None:
    source = 'A = ["x"]\ndef train(a: Optional[str] = Input(default=None, choices=A, description="x")) -> Path: ...'
    assert faults(source, "train") == []


@pytest.mark.parametrize(
    ("function", "model", "renamed"),
    [
        (train.train, JobSettings, {}),
        (
            predict.Predictor.run,
            predict.PredictSettings,
            {"replicate_weights": "weights", "second_condition": "condition"},
        ),
    ],
)
def test_inputs_are_the_settings(function: Any, model: Any, renamed: dict[str, str]) -> None:
    for name, given in inputs(function).items():
        if name == "config":  # stands for all the other settings
            continue
        field = model.model_fields[renamed.get(name, name)]
        bounds = {type(one).__name__.lower(): getattr(one, type(one).__name__.lower(), None) for one in field.metadata}
        assert given.default == (None if field.is_required() else field.default), name
        assert (given.ge, given.le) == (bounds.get("ge"), bounds.get("le")), name
        literal = next(
            (a for a in (field.annotation, *get_args(field.annotation)) if "Literal" in str(get_origin(a))), None
        )
        assert given.choices == (list(get_args(literal)) if literal else None), name


def test_required_settings_are_inputs_and_choices_do_not_clash() -> None:
    # Both schemas share one list of choices for a name.
    training, drawing = inputs(train.train), inputs(predict.Predictor.run)
    assert {name for name, field in JobSettings.model_fields.items() if field.is_required()} <= set(training)
    for name in set(training) & set(drawing):
        assert training[name].choices == drawing[name].choices


def test_container_file_has_no_unknown_key(root: Path) -> None:
    container = yaml.safe_load((root / "cog.yaml").read_text(encoding="utf-8"))
    assert set(container) <= CONTAINER_KEYS
    assert set(container["build"]) <= BUILD_KEYS
    assert container["build"]["cuda"] == "13.0"  # strings: YAML would make numbers of them
    assert container["build"]["python_version"] == "3.11"
    assert container["build"]["sdk_version"] == pins(root)["cog"]
    assert (root / container["build"]["python_requirements"]).is_file()
    assert container["train"] == "train.py:train" and callable(train.train)
    assert container["run"] == "predict.py:Predictor" and issubclass(predict.Predictor, BaseRunner)
    environment = dict(variable.split("=", 1) for variable in container["environment"])
    assert not [name for name, value in environment.items() if REFUSED_ENVIRONMENT.fullmatch(name) or not value]
    # what is downloaded or compiled is kept, under one folder that can be mounted
    folders = {name: value for name, value in environment.items() if "/" in value}
    assert folders.keys() == {"HF_HOME", "ATELIER_WEIGHTS_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert all(value.startswith("/src/.cache/") for value in folders.values())


def pins(root: Path, *files: str) -> dict[str, str]:
    """name -> version, of requirement files in which every line is a plain pin."""
    found: dict[str, str] = {}
    for file in files or ("requirements.txt",):
        for line in (root / file).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line)  # no marker, no hash: Cog drops both
                assert match, f"{file}: {line}"
                assert match[1] not in found, f"{file}: {line} is there twice"
                found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("files", [("requirements.txt",), ("requirements.txt", "requirements-dev.txt")])
def test_requirements_are_complete_and_what_is_tested(root: Path, files: tuple[str, ...]) -> None:
    pinned = pins(root, *files)
    for name, version in pinned.items():
        installed = metadata.distribution(name)
        assert installed.version.partition("+")[0] == version, name
        for text in installed.requires or []:
            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            # the CUDA libraries of torch's own wheel are pinned by torch
            if applies and not needed.name.startswith(("nvidia-", "cuda-", "triton")):
                assert canonicalize_name(needed.name) in pinned, f"{name} needs {needed.name}"


def test_python_versions_agree(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"


def test_train_gives_back_the_archive(fake_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = defaults(train.train) | {"input_images": Path("a.zip"), "seed": 5}
    first, second = train.train(**given), train.train(**given)
    assert first.read_bytes() == b"weights"
    assert first.parent != second.parent and first.parent.parent == Path("outputs")
    expected = JobSettings(input_images="a.zip", seed=5, output_dir=first.parent)
    assert fake_job.settings[0] == expected


def test_train_without_a_result_fails(fake_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_job.leaves_archive = False
    with pytest.raises(RuntimeError, match=r"^FileNotFoundError: .*trained_model"):
        train.train(**defaults(train.train) | {"input_images": Path("a.zip")})


def test_train_refuses_in_one_sentence(fake_job) -> None:
    given = defaults(train.train) | {"input_images": Path("a.zip"), "use_dora": True, "method": "full"}
    with pytest.raises(UserError, match="use_dora goes with"):
        train.train(**given)
    assert fake_job.settings == []


class Scope:
    """Stands for Cog's scope: every metric in the order in which it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def record_metric(self, name: str, value: Any) -> None:
        self.told.append((name, value))


def test_progress_has_one_type_a_metric(fake_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = Scope()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "current_scope", lambda: scope)
    row = {"step": 1, "loss": 1, "images_per_second": 2, "eta_s": 3.5, "lr/weights": 0.1}
    fake_job.rows = [row, row | {"step": 2.0, "loss": float("nan"), "eta_s": 0}]
    train.train(**defaults(train.train) | {"input_images": Path("a.zip")})
    assert dict(scope.told) == {
        **{"stage": "train", "step": 2, "total_steps": 2},
        **{"loss": 1.0, "images_per_second": 2.0, "eta_s": 0.0},  # a loss that is no number was left out
        "drift": 0.5,  # of the finished job
    }
    types: dict[str, set[type]] = {}
    for name, value in scope.told:
        types.setdefault(name, set()).add(type(value))
    assert types == {"stage": {str}, "step": {int}, "total_steps": {int}} | {
        name: {float} for name in ("loss", "images_per_second", "eta_s", "drift")
    }


def test_config_is_for_what_the_inputs_leave_open(fake_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = "seed: 7\ntrigger_word: ABC\nlora_alpha: 3\noutput_dir: outputs/mine\nresume: true"
    given = defaults(train.train) | {"input_images": Path("a.zip"), "trigger_word": "XYZ", "seed": 0, "config": config}
    train.train(**given)
    assert fake_job.settings == [
        JobSettings(
            input_images="a.zip", trigger_word="XYZ", seed=7, lora_alpha=3, output_dir="outputs/mine", resume=True
        )
    ]


class Cancelled(BaseException):
    """As Cog's: no Exception."""


@pytest.mark.parametrize("error", [Cancelled(), UserError("no")])
def test_what_did_not_end_says_how_to_go_on(
    error: BaseException, fake_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_job.error = error
    given = defaults(train.train) | {"input_images": Path("a.zip"), "config": "output_dir: outputs/mine"}
    with pytest.raises(type(error)):
        train.train(**given)
    assert capsys.readouterr().out == ""
    info = tmp_path / "outputs/mine/checkpoints/step_00000020/info.json"
    info.parent.mkdir(parents=True)
    info.touch()
    with pytest.raises(type(error)):
        train.train(**given)
    told = capsys.readouterr().out
    assert "outputs/mine/checkpoints/step_00000020" in told
    assert told.endswith("resume: true\noutput_dir: outputs/mine\n")  # lines for config, as they are


def test_a_bug_is_told_in_one_line_without_secrets(fake_job, capsys) -> None:
    fake_job.error = KeyError("https://me:pw@127.0.0.1/a?token=abc " + "x" * 10_000)
    with pytest.raises(RuntimeError) as told:
        train.train(**defaults(train.train) | {"input_images": Path("a.zip")})
    message, log = str(told.value), capsys.readouterr().err
    assert message.startswith("KeyError") and len(message) <= 300 and "\n" not in message
    assert "Traceback" in log and "conftest.py" in log
    assert not any(secret in text for text in (message, log) for secret in ("pw@", "abc"))


def test_inputs_without_a_bound_in_cog_are_still_checked(fake_job) -> None:
    assert inputs(train.train)["snr_gamma"].ge is None
    with pytest.raises(UserError, match="snr_gamma should be greater than 0"):
        train.train(**defaults(train.train) | {"input_images": Path("a.zip"), "snr_gamma": 0.0})
