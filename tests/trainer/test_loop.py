"""The training loop by way of the real job: what it moves, and that stopping and going on changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer import loop, step
from trainer.config import JobSettings
from trainer.loop import MAX_BAD_STEPS
from trainer.metrics import METRICS_FILE
from trainer.step import TrainStep

# one process of a job on a prepared data set; every step takes the time given, so that it can be caught in the middle
CHILD = """
import shutil, sys, time
from pathlib import Path
from preprocessing.prepared import PreparedDataset
from trainer import job
from trainer.config import JobSettings

settings = JobSettings.model_validate_json(Path(sys.argv[1]).read_text())
dataset = PreparedDataset.load(Path(sys.argv[2]))
job.prepared = lambda *_: dataset
job.finish = lambda fitted, *_: shutil.copytree(fitted.weights, settings.output_dir / "delivered")
job.train(settings, lambda *_: time.sleep(float(sys.argv[3])))
"""


class Stop(Exception):
    """Stops a run from its progress callback."""


def stop_at(last: int):
    """A progress callback that stops the run in step `last`, before its checkpoint."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == last:
            raise Stop

    return progress


def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "eta_s")} for row in rows]


def same(first: Any, second: Any) -> bool:
    """Equality of nested states, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def checkpoints(output_dir: Path) -> list[Path]:
    return sorted((output_dir / "checkpoints").glob("step_*"))


def states(output_dir: Path) -> list[dict[str, Any]]:
    return [torch.load(path / "state.pt", weights_only=True) for path in checkpoints(output_dir)]


def child(config: Path, dataset_folder: Path, pause: float, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(config), str(dataset_folder), str(pause)]
    root = Path(loop.__file__).resolve().parents[1]
    kept = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | environment
    return subprocess.Popen(command, cwd=root, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SLOW = pytest.mark.slow
FALLS = {  # settings, and the share of the first loss that is left
    "pivotal": ({"method": "pivotal", "lora_targets": "all"}, 0.9),
    "full": ({"method": "full"}, 0.6),
    "inversion": ({"method": "textual_inversion", "text_embedding_lr": 0.1}, 0.999),
    "perfusion": ({"method": "perfusion", "class_word": "dog"}, 0.99),
    "lora": ({"method": "lora", "lora_targets": "all"}, 0.9),
    "dora": ({"method": "lora", "use_dora": True, "lora_targets": "all"}, 0.9),
}


@pytest.mark.parametrize("tiny_model", ["sd", pytest.param("xl", marks=SLOW)], indirect=True)
@pytest.mark.parametrize(
    "case", ["pivotal", "full", "inversion", "perfusion", *(pytest.param(c, marks=SLOW) for c in ("lora", "dora"))]
)
def test_loss_falls_on_one_batch(case, tiny_model, settings, train_on, one_picture, monkeypatch):
    (changes, left), real = FALLS[case], step.draw
    monkeypatch.setattr(step, "draw", lambda seed, _, *rest: real(seed, 0, *rest))  # every step the same noise
    once = {"max_train_steps": 25, "lr_warmup_steps": 0, "lr_schedule": "constant", "caption_dropout": 0.0}
    trained = train_on(settings(base_model=str(tiny_model), learning_rate=1e-2, **once, **changes), one_picture)
    assert trained.losses[-1] < left * trained.losses[0]
    assert min(trained.losses) >= 0.9 * trained.losses[-1]  # it does not fall and come back


RUNS = {
    "pivotal": {"ema_decay": 0.9, "noise_offset": 0.1, "gradient_accumulation_steps": 2, "horizontal_flip": True},
    "prodigy": {"method": "lora", "optimizer": "prodigy", "train_text_encoder": True},
    "muon": {"method": "lora", "optimizer": "muon", "lora_targets": "all"},
    "full": {"method": "full", "preview_seeds": (1,)},
    "perfusion": {"method": "perfusion", "class_word": "dog"},
}


@pytest.mark.parametrize(
    "name", ["pivotal", "perfusion", "muon", *(pytest.param(name, marks=SLOW) for name in ("prodigy", "full"))]
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(name, settings, train_on, dataset, tmp_path):
    common = {"max_train_steps": 5, "checkpoint_every": 1, "lr_warmup_steps": 2} | RUNS[name]
    whole = train_on(settings(output_dir=tmp_path / "whole", **common), dataset)
    halves = settings(output_dir=tmp_path / "halves", **common)
    with pytest.raises(Stop):
        train_on(halves, dataset, stop_at(4))
    assert checkpoints(halves.output_dir)[-1].name == "step_00000003"
    torch.manual_seed(99)
    resumed = train_on(halves.model_copy(update={"resume": True}), dataset)
    assert values(resumed.rows) == values(whole.rows) and len(whole.rows) == 5
    assert whole.state.keys() == {"parameters", "optimisers", "average", "scaler", "method", "random"}
    assert same(resumed.state, whole.state)
    assert same(resumed.tensors, whole.tensors)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(settings, train_on, dataset, tmp_path):
    common = {"max_train_steps": 8, "checkpoint_every": 1, "ema_decay": 0.9}
    killed = settings(output_dir=tmp_path / "killed", **common)
    (tmp_path / "settings.json").write_text(killed.model_dump_json(), encoding="utf-8")
    process = child(tmp_path / "settings.json", dataset.folder, pause=0.3)
    until = time.monotonic() + 120
    while not checkpoints(killed.output_dir) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and checkpoints(killed.output_dir), output
    assert 0 < int(checkpoints(killed.output_dir)[-1].name[5:]) < 8
    resumed = train_on(killed.model_copy(update={"resume": True}), dataset)
    whole = train_on(settings(output_dir=tmp_path / "whole", **common), dataset)
    assert values(resumed.rows) == values(whole.rows)
    assert same(resumed.state, whole.state) and same(resumed.tensors, whole.tensors)


def test_what_a_killed_save_left_is_no_checkpoint(settings, train_on, dataset, tmp_path):
    job = settings(checkpoint_every=2, seed=3)
    whole = train_on(job, dataset)
    last = checkpoints(job.output_dir)[-1]
    for name in ("unfinished_00000009", "step_00000008"):  # the second as if its last file had not been written
        (last.parent / name).mkdir()
        (last.parent / name / "state.pt").write_bytes(b"half")
    resumed = train_on(job.model_copy(update={"resume": True}), dataset)
    assert same(resumed.tensors, whole.tensors)


def test_the_last_checkpoints_are_kept(settings, train_on, dataset):
    job = settings(max_train_steps=7, checkpoint_every=2, checkpoints_total_limit=2)
    train_on(job, dataset)
    assert [path.name for path in checkpoints(job.output_dir)] == ["step_00000006", "step_00000007"]
    train_on(settings(max_train_steps=3, checkpoint_every=3), dataset)
    # an earlier job's are never mixed with this one's
    assert [path.name for path in checkpoints(job.output_dir)] == ["step_00000003"]


def test_going_on_with_other_settings_or_pictures_is_refused_by_name(settings, train_on, dataset):
    job = settings(method="textual_inversion", max_train_steps=2, resume=True)
    train_on(job, dataset)
    changes = {"learning_rate": 1e-5, "seed": 1, "lora_rank": 8, "caption_dropout": 0.2, "max_train_steps": 9}
    for name, value in changes.items():
        with pytest.raises(UserError, match=name):
            train_on(job.model_copy(update={name: value}), dataset)
    with pytest.raises(UserError, match="pictures"):
        train_on(job, dataset.model_copy(update={"dataset_hash": "other"}))


def test_what_does_not_change_the_training_may_differ(settings, train_on, dataset):
    job = settings(method="textual_inversion", max_train_steps=2)
    whole = train_on(job, dataset)
    free = {"resume": True, "checkpoint_every": 1, "checkpoints_total_limit": 5, "preview_seeds": (5,)}
    assert same(train_on(job.model_copy(update=free), dataset).tensors, whole.tensors)


def test_going_on_without_a_checkpoint_starts_at_the_beginning(settings, train_on, dataset, tmp_path):
    whole = train_on(settings(), dataset)
    resumed = train_on(settings(output_dir=tmp_path / "other", resume=True), dataset)
    assert same(resumed.tensors, whole.tensors) and len(resumed.rows) == 4


@pytest.mark.parametrize("method", ["pivotal", pytest.param("full", marks=SLOW)])
def test_the_same_seed_gives_the_same_bytes(method, settings, train_on, dataset, tmp_path):
    files = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        done = train_on(settings(method=method, seed=seed, output_dir=tmp_path / str(i)), dataset)
        files.append([path.read_bytes() for path in sorted(done.weights.glob("*.safetensors"))])
    assert files[0] == files[1]
    assert all(a != b for a, b in zip(files[0], files[2], strict=True))


def close(first: Any, second: Any) -> None:
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.tensors, second.tensors, rtol=1e-4, atol=1e-6)


SPLIT = {"preservation_weight": 1.0, "caption_dropout": 0.3, "lora_l1_penalty": 0.1, "max_train_steps": 3}
SPLIT["pivot_fraction"] = 0.5  # the last step trains with frozen tokens


def test_accumulated_batches_are_one_large_batch(settings, train_on, masked_dataset, tmp_path):
    large = train_on(settings(train_batch_size=4, output_dir=tmp_path / "large", **SPLIT), masked_dataset)
    small = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "small"}
    close(train_on(settings(**small, **SPLIT), masked_dataset), large)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_two(settings: JobSettings, dataset: PreparedDataset, scratch: Path) -> None:
    """Run the job on two processes, up to the weights."""
    (scratch / "settings.json").write_text(settings.model_dump_json(), encoding="utf-8")
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [child(scratch / "settings.json", dataset.folder, 0, **where, **rank) for rank in ranks]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_two_processes_are_one_of_twice_the_batch(settings, train_on, read_job, masked_dataset, tmp_path):
    shared = settings(train_batch_size=2, output_dir=tmp_path / "two", **SPLIT)
    train_on_two(shared, masked_dataset, tmp_path)
    one = train_on(settings(train_batch_size=4, output_dir=tmp_path / "one", **SPLIT), masked_dataset)
    two = read_job(tmp_path / "two")
    assert len(two.rows) == 3
    close(two, one)
    # a step of one process would see half as much, so it does not go on with what two began
    with pytest.raises(UserError, match="processes"):
        train_on(shared.model_copy(update={"resume": True}), masked_dataset)


def test_frozen_tokens_neither_move_nor_count_in_the_norm(settings, train_on, dataset):
    """The penalty's gradient alone would be far above the limit; frozen, the tokens have none."""
    changes = {"pivot_fraction": 0.5, "max_train_steps": 4, "token_std_penalty": 1e6, "checkpoint_every": 1}
    trained = train_on(settings(checkpoints_total_limit=9, **changes), dataset)
    norms = [row["grad_norm"] for row in trained.rows]
    assert norms[1] > 1e3 > 10 > max(norms[2:])  # at step 0 their spread is the wanted one
    rates = [row["lr/tokens"] for row in trained.rows]
    assert min(rates[:2]) > 0 and rates[2:] == [0, 0]


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int], spoiled) -> None:
    """Makes the loss of the forward passes `bad` (from 0) what `spoiled(loss, module)` says."""
    real, calls = TrainStep.forward, itertools.count()

    def forward(self: TrainStep, batch: Any) -> torch.Tensor:
        loss = real(self, batch)
        return spoiled(loss, self) if next(calls) in bad else loss

    monkeypatch.setattr(TrainStep, "forward", forward)


def nan_gradient(loss: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    parameter = next(p for p in module.parameters() if p.requires_grad)
    return loss + (parameter * 0).abs().sqrt().sum()  # 0, with a derivative that is not finite


SPOILED = {
    "loss": lambda loss, _: loss * torch.nan,
    "gradient": nan_gradient,
    "infinite": lambda loss, _: loss + torch.inf,
}


@pytest.mark.parametrize("kind", ["gradient", "loss", pytest.param("infinite", marks=SLOW)])
def test_a_step_that_is_not_finite_is_not_applied(kind, settings, train_on, dataset, monkeypatch):
    spoil(monkeypatch, {1, 2, 4}, SPOILED[kind])  # never three in a row
    job = settings(max_train_steps=6, checkpoint_every=1, checkpoints_total_limit=9, ema_decay=0.5, lr_warmup_steps=0)
    trained = train_on(job, dataset)
    kept = states(job.output_dir)
    for number, (before, after) in enumerate(itertools.pairwise(kept), start=1):
        still = all(same(before[name], after[name]) for name in ("parameters", "average")) and all(
            same(a["state"], b["state"]) for a, b in zip(before["optimisers"], after["optimisers"], strict=True)
        )
        moved = not same(before["parameters"], after["parameters"])
        assert (still, moved) == ((True, False) if number in {1, 2, 4} else (False, True))
    assert all(torch.isfinite(tensor).all() for tensor in trained.tensors.values())
    assert [row["step"] for row in trained.rows] == [1, 2, 3, 4, 5, 6]
    # strict JSON: null where there is no number
    strict = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (job.output_dir / METRICS_FILE).read_text().splitlines()
    ]
    assert [row["loss" if kind != "gradient" else "grad_norm"] is None for row in strict] == [
        step in {1, 2, 4} for step in range(6)
    ]


@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=SLOW)])
def test_three_bad_steps_in_a_row_end_the_job_with_the_last_good_state(kind, settings, train_on, dataset, monkeypatch):
    spoil(monkeypatch, {2, 3, 4}, SPOILED[kind])
    job = settings(max_train_steps=9, checkpoint_every=2, checkpoints_total_limit=9)
    assert MAX_BAD_STEPS == 3
    with pytest.raises(UserError, match=r"not finite 3 steps .* step 5.*learning_rate") as caught:
        train_on(job, dataset)
    last = checkpoints(job.output_dir)[-1]
    assert str(last) in str(caught.value)
    good, saved = states(job.output_dir)[0], states(job.output_dir)[-1]
    assert checkpoints(job.output_dir)[0].name == "step_00000002" and same(saved["parameters"], good["parameters"])
    assert all(torch.isfinite(p).all() for p in saved["parameters"])
    monkeypatch.undo()
    resumed = train_on(job.model_copy(update={"resume": True}), dataset)
    assert len(resumed.rows) == 9 and all(torch.isfinite(t).all() for t in resumed.tensors.values())
