"""Cog's real servers, one of each for all tests, with a tiny base model; the pictures and settings of a short job."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cog import service
from tests.cog.outside import Outside, outside
from tests.cog.service import Service
from tests.trainer.conftest import tiny_sd

__all__ = ["tiny_sd"]  # the base model, built anew from its config

FEW = "report_to: none\npreview_prompts: ['a photo of {trigger}']\npreview_seeds: [1]\npreservation_weight: 0\n"
FEW += "holdout: 0\n"  # cross-validation has tests of its own


def pixels(png: bytes) -> bytes:
    """What is to be seen in a file, without what it says of itself."""
    with Image.open(io.BytesIO(png)) as picture:
        return picture.convert("RGB").tobytes()


@pytest.fixture(scope="session")
def world() -> Iterator[Outside]:
    """Where files are served, uploaded and webhooks sent."""
    with outside() as running:
        yield running


@pytest.fixture(scope="session")
def pictures() -> bytes:
    """A zip of four small pictures with captions."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i in range(4):
            drawn = io.BytesIO()
            Image.new("RGB", (40, 40), (60 * i, 120, 200 - 40 * i)).save(drawn, "PNG")
            archive.writestr(f"{i}.png", drawn.getvalue())
            archive.writestr(f"{i}.txt", f"TOK number {i}")
    return packed.getvalue()


@pytest.fixture
def given(tiny_sd: Path, pictures: bytes) -> dict[str, Any]:
    """The inputs of a training of moments, the zip in them; tests change what they are about."""
    return {
        "input_images": service.data_url(pictures, "application/zip"),
        "base_model": str(tiny_sd),
        "captioner": "none",
        "resolution": 32,
        "lora_rank": 4,
        "learning_rate": 0.001,
        "text_embedding_lr": 0.001,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "mixed_precision": "no",
        "config": FEW,
    }


@pytest.fixture(scope="session")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the servers."""
    return service.checkout(root, tmp_path_factory.mktemp("servers") / "src")


@pytest.fixture(scope="session")
def trainer(place: Path, world: Outside) -> Iterator[Service]:
    """The server of trainings, which uploads what it made."""
    with service.running("train", place, "--upload-url", world.url("/up/")) as server:
        yield server


@pytest.fixture(scope="session")
def artist(place: Path, world: Outside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The server of predictions, which answers with the pictures themselves."""
    cache = tmp_path_factory.mktemp("weights")
    with service.running("predict", place, ATELIER_WEIGHTS_CACHE=str(cache)) as server:
        yield server


@pytest.fixture(scope="session")
def weights(trainer: Service, world: Outside, tiny_sd: Path, pictures: bytes) -> str:
    """The address of an archive of weights for the tiny base model, visibly unlike the base."""
    zipped = service.data_url(pictures, "application/zip")
    size = {"resolution": 32, "train_batch_size": 2, "max_train_steps": 6, "lora_rank": 4, "learning_rate": 0.05}
    inputs = {"input_images": zipped, "base_model": str(tiny_sd), "method": "lora", "captioner": "none"} | size
    result = trainer.run(inputs | {"mixed_precision": "no", "config": FEW})
    assert result["status"] == "succeeded", result
    world.files["/weights.tar"] = world.files[result["output"].removeprefix(world.address)]
    return world.url("/weights.tar")
