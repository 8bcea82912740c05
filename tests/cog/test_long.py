"""What takes minutes: a warm server, a run that was cut, a container that starts with weights, the embedded base."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.cog import round_trip, service
from tests.cog.conftest import FEW, pixels
from tests.cog.outside import Outside
from tests.cog.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

JOBS = 20
METHODS = ("pivotal", "full", "lora", "textual_inversion")
CHANGES: dict[str, list[dict[str, Any]]] = {
    # first what makes a library load the most: that happens once and is no leak
    "pivotal": [{"mixed_precision": "bf16"}, {"use_dora": True}, {"n_tokens": 1}, {"optimizer": "prodigy"}, {}],
    "full": [
        {},
        {"train_text_encoder": True},
        {"gradient_checkpointing": True},
        {"lora_rank": 2},
        {"noise_offset": 0.1},
    ],
    "lora": [
        {},
        {"train_text_encoder": True},
        {"use_dora": True},
        {"optimizer": "prodigy"},
        {"mixed_precision": "bf16"},
    ],
    "textual_inversion": [
        {},
        {"n_tokens": 5},
        {"horizontal_flip": True},
        {"class_word": "dog"},
        {"caption_dropout": 0.9},
    ],
}


def job(number: int, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs of one of the jobs, no two alike."""
    method = METHODS[number % len(METHODS)]
    own = {"method": method, "seed": number, "trigger_word": f"TOK{number}"} | CHANGES[method][number // len(METHODS)]
    extra = "ema_decay: 0.9\n" if number % 3 == 0 else ""
    return given | own | {"config": FEW + extra}


def alone(inputs: dict[str, Any], pictures: bytes, root: Path, folder: Path) -> bytes:
    """The archive that the same job leaves in a process of its own."""
    folder.mkdir()
    (folder / "data.zip").write_bytes(pictures)
    values = {name: value for name, value in inputs.items() if name != "config"}
    values |= {"input_images": str(folder / "data.zip"), "output_dir": str(folder / "out")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values) + inputs["config"], encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", recipe], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "out" / "trained_model.tar").read_bytes()


def resident(server: Service) -> int:
    """Bytes of memory that the server's worker has."""
    (worker,) = psutil.Process(server.process.pid).children()
    return worker.memory_info().rss


def test_twenty_jobs_on_a_warm_worker_are_as_each_alone_and_memory_stays(
    root: Path, tmp_path: Path, given: dict[str, Any], pictures: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    warm, memory = [], []
    with service.running("train", service.checkout(root, tmp_path / "src")) as server:
        for number in range(JOBS):
            result = server.run(job(number, given))
            assert result["status"] == "succeeded", (number, result)
            warm.append(service.weights(service.content(result["output"])))
            server.idle(10)
            memory.append(resident(server))
    with capsys.disabled():
        print("\nMiB after each job:", *(f"{size / 2**20:.0f}" for size in memory))
    assert len({content for weights in warm for content in weights.values()}) == sum(map(len, warm))  # no two alike
    for number, weights in enumerate(warm):
        assert weights == service.weights(alone(job(number, given), pictures, root, tmp_path / str(number))), number
    assert memory[-1] < 1.05 * memory[1]


def test_a_cancelled_run_that_was_resumed_gives_the_weights_of_an_uncut_one(
    trainer: Service, world: Outside, given: dict[str, Any]
) -> None:
    inputs = given | {"max_train_steps": 400, "optimizer": "prodigy"}
    often = FEW + "checkpoint_every: 20\n"
    uncut = trainer.run(inputs | {"config": often})
    assert uncut["status"] == "succeeded", uncut
    cut = inputs | {"config": often + "output_dir: outputs/cut\n"}
    trainer.start("cut", cut, webhook=world.url("/cut"))
    trainer.poll("cut", lambda state: state.get("metrics", {}).get("step", 0) > 100)
    trainer.call("POST", "/trainings/cut/cancel")
    told = world.told("/cut", lambda state: state["status"] in service.ENDED)[-1]
    assert told["status"] == "canceled" and re.search(r"last checkpoint is outputs/cut/checkpoints/step_", told["logs"])
    resumed = trainer.run(cut | {"config": cut["config"] + "resume: true\n"})
    assert resumed["status"] == "succeeded", resumed
    ends = [world.files[result["output"].removeprefix(world.address)] for result in (uncut, resumed)]
    assert service.weights(ends[0]) == service.weights(ends[1])
    first = re.search(r"train:.*?\| (\d+)/400", resumed["logs"])
    assert first and int(first[1]) >= 100


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5])
def test_a_cancel_while_libraries_are_loaded_harms_no_later_job(
    seconds: float, root: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    with service.running("train", service.checkout(root, tmp_path / "src")) as server:
        server.start("first", given)
        time.sleep(seconds)
        assert server.call("POST", "/trainings/first/cancel").status == 200
        server.idle(120)
        assert "not finished" not in server.log.read_text(encoding="utf-8")
        result = server.run(given)
    assert result["status"] == "succeeded", result


def test_a_container_may_start_with_weights(artist: Service, weights: str, place: Path, tmp_path: Path) -> None:
    picture = {"prompt": "a photo of TOK", "seed": 3, "num_inference_steps": 2}
    expected = artist.run(picture | {"replicate_weights": weights})
    own = {"COG_WEIGHTS": weights, "ATELIER_WEIGHTS_CACHE": str(tmp_path)}
    with service.running("predict", place, **own) as server:
        drawn = server.run(picture)
    assert drawn["status"] == "succeeded", drawn
    pictures = [pixels(service.content(result["output"][0])) for result in (expected, drawn)]
    assert pictures[0] == pictures[1]


def test_the_embedded_base_trains_and_draws(tmp_path: Path) -> None:
    round_trip.main(tmp_path / "work")
