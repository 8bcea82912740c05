"""The model card, and the push to the Hub: the library's own client against a stand-in for the Hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from PIL import Image

import train
from preprocessing.errors import UserError
from tests.trainer.pictures import call_of, drawn, pixels
from trainer import artifact, delivery, hub, job, model_card, publish
from trainer.generate import Generator
from trainer.model_card import Place
from trainer.report import Preview

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
TOKEN = "hf_secret_token"


@dataclass
class FakeHub:
    """What a stand-in for the Hub was sent."""

    url: str = ""
    status: int = 200
    wait: float = 0.0  # seconds before it answers
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


def handler(state: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            time.sleep(state.wait)
            state.tokens.add(self.headers.get("authorization"))
            self.answer(state.status, self.told(body) if state.status == 200 else {"error": "no"})

        def told(self, body: bytes) -> dict[str, Any]:
            if self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                return {"url": f"{state.url}/me/robot"}
            if "/preupload/" in self.path:
                names = [one["path"] for one in json.loads(body)["files"]]
                return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return {"commitUrl": f"{state.url}/me/robot/commit/1", "commitOid": "1", "hookOutput": ""}
            return {}

        def do_GET(self) -> None:
            self.answer(state.status, {"sha": "1", "siblings": [], "id": "me/robot"})

        def answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that takes uploads as the Hub does, and a login for it."""
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=state.url))
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(train_variant, lab, tmp_path) -> Callable[..., tuple[Path, Path, list[Preview], Any]]:
    """Trains a variant and finishes it as a job does: the folder, the archive, the previews, the settings."""

    def made(variant: str, **changes: Any) -> tuple[Path, Path, list[Preview], Any]:
        folder, method = train_variant(variant, **changes)
        method.detach(lab.family)
        (folder / "samples").mkdir()
        previews = []
        for i, prompt in enumerate(("a photo of TOK", "a dog | cat")):
            paths = [folder / "samples" / f"{i:02d}_{kind}.png" for kind in ("base", "adapted")]
            for path in paths:
                Image.new("RGB", (8, 8)).save(path)
            previews.append(Preview(prompt, 3, *paths))
        delivery.add_card(folder, method.settings, previews)
        artifact.write(folder, tmp_path / "trained_model.tar")
        return folder, tmp_path / "trained_model.tar", previews, method.settings

    return made


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@SD_ONLY
def test_a_push_makes_a_repository_that_loaders_read(finished, fake_hub, tiny_model, tmp_path) -> None:
    folder, archive, previews, settings = finished("pivotal", push_to_hub="me/robot")
    pushed = publish.push(folder, archive, previews, settings)
    assert pushed.error is None and pushed.url == f"{fake_hub.url}/me/robot"
    assert fake_hub.created[0]["name"] == "robot" and fake_hub.created[0]["visibility"] == "private"
    expected = {"README.md", "pytorch_lora_weights.safetensors", "embeddings.safetensors", "trained_model.tar"}
    expected |= {f"samples/{i:02d}_{kind}.png" for i in (0, 1) for kind in ("base", "adapted")}
    names = ("adapter", "adapter_with_embeddings", "embeddings/TOK")
    assert set(fake_hub.files) == expected | {f"comfyui/{name}.safetensors" for name in names}
    assert fake_hub.files["trained_model.tar"] == archive.read_bytes()
    card = fake_hub.files["README.md"].decode()
    assert header(card)["instance_prompt"] == "TOK"
    assert header(card)["widget"][0] == {"text": "a photo of TOK", "output": {"url": "samples/00_adapted.png"}}
    assert "--weights me/robot" in card and 'load_lora_weights("me/robot"' in card
    assert fake_hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in fake_hub.files.values())
    assert hub.wanted("me/robot", list(fake_hub.files)) == ["trained_model.tar"]  # what predict.py takes


@SD_ONLY
@pytest.mark.parametrize(
    ("status", "wait", "told"), [(401, 0, "status 401"), (500, 0, "failed"), (200, 3, "no answer")]
)
def test_a_push_that_fails_is_one_sentence(status, wait, told, finished, fake_hub, capsys) -> None:
    fake_hub.status, fake_hub.wait = status, wait
    folder, archive, previews, settings = finished("inversion", push_to_hub="me/robot", hub_private=False)
    started = time.monotonic()
    pushed = publish.push(folder, archive, previews, settings, seconds=1.5)
    assert time.monotonic() - started < 3
    assert pushed.url is None and (told in pushed.error or "no answer" in pushed.error) and "\n" not in pushed.error
    assert str(archive) in pushed.error and archive.is_file()
    assert TOKEN not in pushed.error + "".join(capsys.readouterr())


@SD_ONLY
def test_a_job_pushes_after_all_is_done_and_the_door_tells(
    settings, dataset, fake_hub, tiny_model, monkeypatch, capsys
):
    """The whole job; a failed push leaves the archive and makes the door's error, after the paths."""
    monkeypatch.setattr(job, "prepared", lambda *_: dataset)
    chosen = settings(max_train_steps=1, push_to_hub="me/robot", preview_prompts=("TOK",), preview_seeds=(1,))
    result = job.train(chosen)
    assert result.pushed.url == f"{fake_hub.url}/me/robot" and "samples/00_adapted.png" in fake_hub.files
    assert fake_hub.files["trained_model.tar"] == result.archive.read_bytes()
    fake_hub.status = 403
    flags = [
        f"--{name}={value}" for name, value in (("input_images", chosen.input_images), ("push_to_hub", "me/robot"))
    ]
    monkeypatch.setattr(job, "train", lambda *_, **__: job_result(result))
    with pytest.raises(UserError, match="push_to_hub me/robot failed"):
        train.main(flags)
    assert f"weights: {result.archive}" in capsys.readouterr().out


def job_result(result: job.JobResult) -> job.JobResult:
    failed = publish.Pushed("me/robot", error="push_to_hub me/robot failed (status 403)")
    return job.JobResult(**{**vars(result), "pushed": failed})


def test_what_cannot_come_to_anything_is_told_before_training(settings, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        job.fill(settings(push_to_hub="me/robot"))
    with pytest.raises(UserError, match="is no repository"):
        job.fill(settings(push_to_hub="robot"))


@pytest.mark.parametrize(
    ("tiny_model", "variant", "place"),
    [
        ("xl", "pivotal", "hub"),
        ("flux", "pivotal", "archive"),
        pytest.param("xl", "pivotal dora", "archive", marks=pytest.mark.slow),
        pytest.param("sd", "pivotal", "archive", marks=pytest.mark.slow),
        pytest.param("sd", "lora", "hub", marks=pytest.mark.slow),
    ],
    indirect=["tiny_model"],
)
def test_the_cards_python_draws_what_we_draw(variant, place, finished, tiny_model, tmp_path, monkeypatch) -> None:
    """The block on the card runs, and its picture is our Generator's."""
    folder, archive, previews, settings = finished(variant)
    if place == "hub":
        where = tmp_path / "repository"
        where.mkdir()
        publish._arrange(folder, archive, where, "me/robot", previews)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(where / name))
        card = (where / "README.md").read_text(encoding="utf-8")
    else:
        where, card = folder, (settings.output_dir / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    for written, here in {
        f'"{model_card.base_name(artifact.read_manifest(folder))}"': repr(str(tiny_model)),
        '"me/robot", weight': f'"{where}", weight',
        '"trained_model': f'"{where}',
        ".float16": ".float32",
        ".bfloat16": ".float32",
        '.to("cuda")': "",
        ").images[0]": ", generator=torch.Generator().manual_seed(4), **call_of(pipe)).images[0]",
    }.items():
        code = code.replace(written, here)
    values: dict[str, Any] = {"call_of": call_of}
    exec(code, values)
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    assert np.abs(pixels(values["picture"]) - drawn(generator, "a photo of TOK")).max() <= 1


@SD_ONLY
@pytest.mark.parametrize("variant", ["full", "inversion", "lora"])
def test_the_card_of_every_method(variant, finished) -> None:
    folder, *_ = finished(variant)
    card = (folder / "README.md").read_text(encoding="utf-8")
    tags = header(card)["tags"]
    assert {"text-to-image", "stable-diffusion"} < set(tags) and header(card)["license"] == "unknown"
    assert "a dog \\| cat" in card and "samples/01_base.png" in card  # a prompt cannot break the table
    assert ("--merge true" in card) == (variant == "full")
    assert ("models/loras" in card) == (variant == "lora") and ("embedding:TOK" in card) == (variant == "inversion")
    for path in (folder / "samples").iterdir():
        assert f"samples/{path.name}" in card


def test_no_path_of_this_machine_is_on_the_card(finished, tmp_path) -> None:
    folder, *_ = finished("lora")
    assert str(tmp_path) not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: openrail++\n---\n# x", "openrail++"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("# no header", ""),
        ("---\nlicense: [\n---\n", ""),
        (None, ""),
    ],
)
def test_the_license_is_the_bases_own(text: str | None, found: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert hub.license_of(str(tmp_path)) == found


def test_a_license_on_the_hub_is_asked_for_with_a_time_limit(monkeypatch) -> None:
    asked = []

    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            asked.append((name, timeout))
            if name == "me/gone":
                raise OSError("no network")
            return type("Info", (), {"card_data": huggingface_hub.ModelCardData(license="mit")})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.license_of("me/base") == "mit" and hub.license_of("me/gone") == ""
    assert asked == [("me/base", hub.TIMEOUT), ("me/gone", hub.TIMEOUT)]


def test_places_name_files_where_the_reader_has_them() -> None:
    assert Place(None, frozenset()).path("a") == '"trained_model/a"'
    assert Place("me/it", frozenset()).path("a") == 'hf_hub_download("me/it", "a")'
