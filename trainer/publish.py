"""Finished weights on the Hub: a repository that diffusers' `load_lora_weights` and our `predict.py` read by its name.

    README.md                           the model card
    pytorch_lora_weights.safetensors    the adapter, and embeddings.safetensors the new tokens
    model_index.json, unet/, ...        or of method full the whole pipeline, for diffusers' `from_pretrained`
    comfyui/, samples/                  as in the archive
    trained_model.tar                   the archive itself

The token is the environment's or the login's (huggingface_hub), never a setting, and is never printed.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.errors import UserError
from trainer import artifact, delivery, hub, model_card
from trainer.config import JobSettings
from trainer.model_card import Place
from trainer.report import Preview

ARCHIVE = "trained_model.tar"
LONGEST = 1800  # seconds that an upload may take: the Hub's client itself waits without end


@dataclass(frozen=True)
class Pushed:
    """How a push ended: the repository's address, or what went wrong in one sentence."""

    repository: str
    url: str | None = None
    error: str | None = None

    @property
    def told(self) -> str:
        """In one line."""
        return f"pushed: {self.url}" if self.error is None else self.error


def check(settings: JobSettings) -> None:
    """Raise UserError, before anything is trained, where a push is asked for that cannot come to anything."""
    if settings.push_to_hub is None:
        return
    from huggingface_hub import get_token

    if not hub.REPOSITORY.fullmatch(settings.push_to_hub):
        raise UserError(f"push_to_hub {settings.push_to_hub!r} is no repository: give owner/name.")
    if get_token() is None:
        raise UserError("push_to_hub needs a token of the Hub: set HF_TOKEN in the environment or run hf auth login.")


def push(
    folder: Path, archive: Path, previews: list[Preview], settings: JobSettings, seconds: float = LONGEST
) -> Pushed:
    """Upload the finished weights in `folder`, packed as `archive`. What goes wrong on the Hub is told, not raised."""
    repository = settings.push_to_hub
    with tempfile.TemporaryDirectory(prefix="push-") as name:
        _arrange(folder, archive, Path(name), repository, previews)
        try:
            url = _within(seconds, lambda: _upload(repository, settings.hub_private, Path(name)))
        except _hub_errors() as error:
            return Pushed(repository, error=_sentence(repository, error, archive))
    return Pushed(repository, url=url)


def _arrange(folder: Path, archive: Path, target: Path, repository: str, previews: list[Preview]) -> None:
    """Lay the repository's files out in `target`."""
    manifest = artifact.read_manifest(folder)
    delivery.save_diffusers(folder, target)
    for part in ("comfyui", "samples"):
        if (folder / part).is_dir():
            shutil.copytree(folder / part, target / part)
    shutil.copyfile(archive, target / ARCHIVE)
    files = frozenset(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    model_card.write(target / artifact.CARD, manifest, previews, Place(repository, files))


def _upload(repository: str, private: bool, folder: Path) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    created = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Trained weights")
    return str(created)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; TimeoutError where that takes longer, which leaves it to end by itself."""
    ended: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:  # raised again below, in the caller's thread
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    value, error = ended[0]
    if error is not None:
        raise error
    return value


def _hub_errors() -> tuple[type[Exception], ...]:
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError

    return HTTPError, HFValidationError, OSError


def _sentence(repository: str, error: Exception, archive: Path) -> str:
    """Without the library's words, which quote addresses."""
    response = getattr(error, "response", None)
    reason = type(error).__name__ if response is None else f"status {response.status_code}"
    if isinstance(error, TimeoutError):
        reason = str(error)
    return (
        f"push_to_hub {repository} failed ({reason}), and nothing is lost: the weights are {archive}; check the "
        "token's right to write and run the same job with resume, which pushes again."
    )
