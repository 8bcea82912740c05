"""For all tests: one thread and no network; stand-ins for the job and the generator behind the doors."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

# Before anything imports torch or a Hub client.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@dataclass
class FakeJob:
    """Stands for `trainer.job`: remembers the settings and leaves an archive, unless told not to."""

    folder: Path
    leaves_archive: bool = True
    settings: list[Any] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def train(self, settings: Any, progress: Any = None, on_step: Any = None) -> types.SimpleNamespace:
        self.settings.append(settings)
        if progress:
            progress("train", 1, 2)
        if on_step:
            for row in self.rows:
                on_step(row, 2)
        if self.error:
            raise self.error
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        archive = settings.output_dir / "trained_model.tar"
        if self.leaves_archive:
            archive.write_bytes(b"weights")
        summary = types.SimpleNamespace(sentences=lambda: ["It is as good as it gets."], scores=lambda: {"drift": 0.5})
        report = settings.output_dir / "report.html"
        return types.SimpleNamespace(archive=archive, report=report, summary=summary, pushed=None)


@pytest.fixture
def fake_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    """The job replaced by a stand-in that trains nothing."""
    import trainer

    job = FakeJob(tmp_path / "out")
    module = types.ModuleType("trainer.job")
    module.train = job.train
    monkeypatch.setitem(sys.modules, "trainer.job", module)
    monkeypatch.setattr(trainer, "job", module, raising=False)
    return job


class FakeGenerator:
    """Stands for `trainer.generate.Generator`: notes its calls, draws plain pictures whose red is the seed."""

    calls: ClassVar[list[Any]] = []

    def __init__(
        self, base_model: str, device: str | None = None, companion: str | None = None, precision: str = "same"
    ):
        self.calls.append(("base", base_model) if companion is None else ("base", base_model, companion))
        self.archives: tuple[Path, ...] = ()

    @staticmethod
    def check(base_model: str) -> None:
        if base_model == "nonsense":
            raise ValueError("no such base model")

    def use(self, *archives: Path) -> None:
        self.calls.append(("use", *archives))
        if any(archive.read_bytes() == b"broken" for archive in archives):
            raise ValueError("broken weights")
        self.archives = archives

    def release(self) -> None:
        self.calls.append("release")
        self.archives = ()

    def draw(self, settings: Any) -> list[Any]:
        from PIL import Image

        self.calls.append(settings)
        return [Image.new("RGB", (8, 8), (settings.seed + i, 0, 0)) for i in range(settings.num_outputs)]


@pytest.fixture
def generator_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The generator and the reading of weights replaced by stand-ins; gives back the notes of what was called."""
    import trainer

    monkeypatch.setattr(FakeGenerator, "calls", [])
    monkeypatch.setenv("ATELIER_WEIGHTS_CACHE", str(tmp_path / "cache"))
    modules = [types.ModuleType(f"trainer.{name}") for name in ("generate", "foreign", "families")]
    generate, foreign, families = modules
    generate.Generator = FakeGenerator
    generate.seed_of = lambda settings: 99 if settings.seed is None else settings.seed
    foreign.unpacked = contextlib.nullcontext
    foreign.companion_of = lambda path: "its other half" if "half" in path.name else None
    foreign.base_of = lambda path: None if "plain" in path.name else f"base of {path.stem}"
    families.family_class = FakeGenerator.check
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(trainer, module.__name__.partition(".")[2], module, raising=False)
    return FakeGenerator.calls
