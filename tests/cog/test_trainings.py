"""The real server of trainings: from a zip to weights, progress on the way, cancel and resume, and every mistake."""

from __future__ import annotations

import contextlib
import http.client
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from preprocessing.errors import LONGEST_MESSAGE
from tests.cog import service
from tests.cog.conftest import FEW
from tests.cog.outside import Outside
from tests.cog.service import Service

METRICS = {"stage": str, "step": int, "total_steps": int, "loss": float, "images_per_second": float, "eta_s": float}
WEIGHTS = ("adapter.safetensors", "embeddings.safetensors", "comfyui/adapter.safetensors")
WEIGHTS += ("comfyui/adapter_with_embeddings.safetensors", "comfyui/embeddings/TOK.safetensors")
LONG = 100_000  # steps: a training that ends by a cancel only


def in_training(step: int) -> Any:
    return lambda state: state.get("metrics", {}).get("step", 0) >= step


def test_from_a_served_zip_to_uploaded_weights(
    trainer: Service, world: Outside, given: dict[str, Any], pictures: bytes
) -> None:
    world.files["/my%20pictures"] = pictures  # no extension: the content says what it is
    served = given | {"input_images": world.url("/my%20pictures", query="?token=s3cret"), "max_train_steps": 40}
    started = trainer.start("whole", served, webhook=world.url("/hook"))
    assert started.status == 202 and started.body["status"] in ("starting", "processing")
    polls = trainer.poll("whole", lambda state: state["status"] in service.ENDED)
    hooks = world.told("/hook", lambda told: told["status"] in service.ENDED)

    last = hooks[-1]
    assert last["status"] == "succeeded", last
    assert re.search(r"train:.*40/40", last["logs"])  # the progress bar
    (uploaded,) = [path for path in world.files if path.startswith("/up/")]
    assert last["output"] == world.url(uploaded)
    assert set(service.weights(world.files[uploaded])) == set(WEIGHTS)
    for told in (polls, hooks):
        running = [state["metrics"] for state in told if state["status"] == "processing"]
        in_loop = [metrics for metrics in running if METRICS.keys() <= metrics.keys()]
        assert len({metrics["step"] for metrics in in_loop}) > 1  # seen while it ran
        assert {metrics["total_steps"] for metrics in in_loop} == {40}
        for metrics in in_loop:
            assert {name: type(metrics[name]) for name in METRICS} == METRICS
    steps = [state["metrics"]["step"] for state in polls if "step" in state.get("metrics", {})]
    assert steps == sorted(steps)
    stages = {state.get("metrics", {}).get("stage") for state in polls + hooks}
    assert {"train", "preview"} <= stages
    assert "s3cret" not in trainer.log.read_text(encoding="utf-8") + str(last["logs"])


def test_cancel_leaves_a_checkpoint_that_the_next_run_goes_on_from(
    trainer: Service, world: Outside, given: dict[str, Any]
) -> None:
    often = "checkpoint_every: 5\n"
    long = given | {"method": "lora", "max_train_steps": LONG, "config": FEW + often}
    trainer.start("cancelled", long, webhook=world.url("/cancelled"))
    trainer.poll("cancelled", in_training(12))
    busy = trainer.call("POST", "/trainings", {"input": given})
    assert busy.status == 409 and len(str(busy.body)) < LONGEST_MESSAGE
    called = time.monotonic()
    assert trainer.call("POST", "/trainings/cancelled/cancel").status == 200
    trainer.idle(10)
    assert time.monotonic() - called < 2
    told = world.told("/cancelled", lambda state: state["status"] in service.ENDED)[-1]
    assert told["status"] == "canceled"
    resume = re.search(r"step_(\d+); .*\n(resume: true\noutput_dir: \S+)", told["logs"])
    assert resume, told["logs"]
    step = int(resume[1])
    assert step >= 10 and step % 5 == 0

    again = long | {"config": f"{FEW}{often}{resume[2]}\n"}
    trainer.start("resumed", again)
    seen = trainer.poll("resumed", in_training(step + 1))
    first = next(state["metrics"]["step"] for state in seen if "step" in state.get("metrics", {}))
    assert first > step
    trainer.call("POST", "/trainings/resumed/cancel")
    trainer.idle(10)


DATA_ZIP = "data:application/zip;base64,"
MISTAKES = [
    ({"input_images": DATA_ZIP + "UEsDBA=="}, "damaged or was cut off"),
    ({"input_images": DATA_ZIP + "aGVsbG8gd29ybGQ="}, "neither zip, tar nor tar.gz"),
    ({"input_images": DATA_ZIP + "UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA=="}, "holds no pictures"),
    ({"input_images": DATA_ZIP + "%%%"}, "neither zip, tar nor tar.gz"),
    ({"input_images": "{served}/nowhere.zip?token=s3cret"}, "/nowhere.zip cannot be downloaded (status 404)"),
    ({"input_images": "http://me:s3cret@127.0.0.1:9/x.zip?token=s3cret"}, "http://127.0.0.1:9/x.zip cannot be"),
    ({"input_images": "nowhere.zip"}, "input_images nowhere.zip does not exist"),
    ({"base_model": "nobody/nothing"}, "base_model 'nobody/nothing' is neither"),
    ({"config": "sede: 1"}, "config: sede is no setting; did you mean seed?"),
    ({"config": "output_dir: /tmp/elsewhere"}, "not inside outputs"),
    ({"method": "full", "use_dora": True}, "use_dora goes with"),
    ({"trigger_word": "two words"}, "trigger_word"),
    ({"trigger_word": "x" * 100_000 + " y"}, "trigger_word"),
]


@pytest.mark.parametrize(("wrong", "told"), MISTAKES)
def test_a_mistake_is_one_short_sentence(
    wrong: dict[str, Any], told: str, trainer: Service, world: Outside, given: dict[str, Any]
) -> None:
    log_before = trainer.log.stat().st_size
    wrong = {
        name: value.replace("{served}", world.address) if isinstance(value, str) else value
        for name, value in wrong.items()
    }
    result = trainer.run(given | wrong)
    assert result["status"] == "failed"
    assert told in result["error"]
    assert len(result["error"]) < LONGEST_MESSAGE + len("Input validation error: ") and "\n" not in result["error"]
    log = trainer.log.read_bytes()[log_before:].decode()
    assert not any("s3cret" in text or "Traceback" in text for text in (result["error"], result["logs"], log))
    trainer.idle(5)  # and there is a worker still


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"max_train_steps": "many"}, "max_train_steps"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"max_train_steps": 1.5}, "max_train_steps"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"method": "lorra"}, "method"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"seed": None}, "seed"),
        ({"input_images": 5}, "input_images"),
    ],
)
def test_what_the_schema_refuses_names_the_input(
    wrong: dict[str, Any], field: str, trainer: Service, given: dict[str, Any]
) -> None:
    answer = trainer.call("POST", "/trainings", {"input": given | wrong})
    assert answer.status == 422
    assert [one["loc"][-1] for one in answer.body["detail"]] == [field]


def test_an_unknown_input_is_dropped_by_cog_which_says_so_in_its_log(trainer: Service, given: dict[str, Any]) -> None:
    result = trainer.run(given | {"max_train_step": 1, "input_images": "nowhere.zip"})
    assert result["error"].endswith("nowhere.zip does not exist: give an archive or folder of pictures.")
    assert "Stripped unknown input fields" in trainer.log.read_text(encoding="utf-8")


def test_missing_pictures_are_refused(trainer: Service) -> None:
    answer = trainer.call("POST", "/trainings", {"input": {}})
    assert answer.status == 422 and answer.body["detail"][0]["loc"][-1] == "input_images"


def test_an_upload_over_the_limit_is_refused_and_the_input_says_the_way_out(trainer: Service) -> None:
    address = urlsplit(trainer.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    head, tail = b'{"input": {"input_images": "' + DATA_ZIP.encode(), b'"}}'
    size = 101 * 2**20
    connection.putrequest("POST", "/trainings")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(len(head) + size + len(tail)))
    connection.endheaders(head)
    with contextlib.suppress(ConnectionError):  # it need not read to the end
        for _ in range(101):
            connection.send(b"A" * 2**20)
        connection.send(tail)
    assert connection.getresponse().status == 413
    connection.close()
    described = trainer.call("GET", "/openapi.json").body["components"]["schemas"]["TrainingInput"]["properties"]
    assert all(part in described["input_images"]["description"] for part in ("75 MiB", "413", "URL"))


def test_the_archive_is_kept_in_the_working_directory_too(
    trainer: Service, place: Path, world: Outside, given: dict[str, Any]
) -> None:
    result = trainer.run(given | {"config": FEW + "output_dir: outputs/mine"})
    assert result["status"] == "succeeded", result
    kept = (place / "outputs" / "mine" / "trained_model.tar").read_bytes()
    assert world.files[urlsplit(result["output"]).path] == kept
