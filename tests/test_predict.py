"""The door to drawing over a stand-in for the generator: weights, bases, files, downloads."""

from __future__ import annotations

import http.server
import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import predict
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
    studio.ready(str(weights), None)
    studio.ready(str(weights), None)
    assert [call for call in generator_calls if call != "release"] == [("base", "base of mine"), ("use", weights)]
    generator_calls.clear()
    studio.ready(None, "base of mine")  # without weights: the same base as it was
    studio.ready(None, "base of mine")
    assert generator_calls == ["release"]
    generator_calls.clear()
    studio.ready(None, None)
    assert generator_calls == [("base", "toybox")]


def test_weights_that_changed_on_disk_are_loaded_again(generator_calls: list[Any], weights: Path) -> None:
    studio = predict.Studio()
    studio.ready(str(weights), None)
    other = weights.with_name("other.tar")
    other.write_bytes(b"newer weights")
    other.replace(weights)
    generator_calls.clear()
    studio.ready(str(weights), None)
    assert generator_calls == ["release", ("use", weights)]


def test_after_broken_weights_the_next_request_is_clean(generator_calls: list[Any], weights: Path) -> None:
    broken = weights.with_name("broken.tar")
    broken.write_bytes(b"broken")
    studio = predict.Studio()
    studio.ready(str(weights), "toybox")
    with pytest.raises(ValueError, match="broken weights"):
        studio.ready(str(broken), "toybox")
    generator_calls.clear()
    studio.ready(None, "toybox")
    assert generator_calls == []  # the base was left as it was
    studio.ready(str(weights), "toybox")
    assert generator_calls[-1] == ("use", weights)


def test_given_base_wins(generator_calls: list[Any], weights: Path) -> None:
    predict.Studio().ready(str(weights), "another")
    assert generator_calls[0] == ("base", "another")


@pytest.mark.parametrize("flag", ["--weights", "--image"])
def test_missing_files_are_told_before_a_model_is_loaded(flag: str, generator_calls: list[Any]) -> None:
    with pytest.raises(UserError, match=r"nowhere\.x do(es)? not exist"):
        predict.main(["--prompt", "a", flag, "nowhere.x"])
    assert generator_calls == []


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "prompt is missing: give --prompt TEXT"),
        (["--prompt", "a", "--num_outputs", "0"], "--num_outputs"),
        (["--prompt", "a", "--prompt_strength", "1.5"], "--prompt_strength"),
        (["--prompt", "a", "--scheduler", "eulr"], "--scheduler"),
        (["recipe.yaml", "--prompt", "a"], "'recipe.yaml' is not understood"),
    ],
)
def test_mistakes(argv: list[str], told: str, generator_calls: list[Any]) -> None:
    with pytest.raises(UserError, match=told):
        predict.main(argv)
    assert generator_calls == []


def test_cog_predictor(generator_calls: list[Any], weights: Path) -> None:
    predictor = predict.Predictor()
    predictor.setup(weights=str(weights))
    assert generator_calls[0] == ("base", "base of mine")
    given = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    files = predictor.run(**given | {"prompt": "TOK", "num_outputs": 2, "seed": 3, "lora_scale": 0.5})
    assert generator_calls[-1] == DrawSettings(prompt="TOK", num_outputs=2, seed=3, lora_scale=0.5)
    assert [file.is_file() for file in files] == [True, True]


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole.tar is whole, /short.tar ends before its length, all else is missing."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/gone.tar":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "7" if self.path == "/whole.tar" else "700")
        self.end_headers()
        self.wfile.write(b"weights")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests' output stays readable."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(predict, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_url_is_downloaded_once(server: str, generator_calls: list[Any]) -> None:
    studio = predict.Studio()
    studio.ready(f"{server}/whole.tar", "toybox")
    studio.ready(f"{server}/whole.tar", "toybox")
    assert Handler.requests == ["/whole.tar"]
    assert generator_calls[-1][0] == "use" and generator_calls[-1][1].read_bytes() == b"weights"


@pytest.mark.parametrize("path", ["/gone.tar", "/short.tar"])
def test_failed_download_leaves_nothing(server: str, path: str, generator_calls: list[Any]) -> None:
    with pytest.raises(UserError, match="cannot be downloaded"):
        predict.Studio().ready(server + path, "toybox")
    assert list(predict.DOWNLOADS.iterdir()) == []


def test_server_that_is_not_there(generator_calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(predict, "DOWNLOADS", tmp_path)
    with pytest.raises(UserError, match="cannot be downloaded"):
        predict.fetched("http://127.0.0.1:9/none.tar")
