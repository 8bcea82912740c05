"""Weights that lie on the Hub: which of a repository's files are wanted, and their bytes as one file."""

from __future__ import annotations

import functools
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from preprocessing.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# owner/name, or owner/name/path/of/a/file.safetensors
ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w./ -]+)?")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT = 20  # seconds that the Hub may take to answer a question
ARCHIVE = "trained_model.tar"
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # what diffusers and peft write
BESIDE = ("embeddings.safetensors", "embeddings.pti", "special_params.json", "adapter_config.json")
CHUNK = 2**20


def is_repository(source: str) -> bool:
    """Whether it could be a repository's name, and nothing of that name lies here."""
    return REPOSITORY.fullmatch(source) is not None and not Path(source).exists()


@functools.cache  # asked with the weights of every step that is kept
def license_of(source: str) -> str:
    """The license that a base model's own card names: a folder's README.md, or a repository's; "" where none does."""
    import yaml
    from huggingface_hub import HfApi

    card, found = Path(source) / "README.md", {}
    try:
        if card.is_file():
            header = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
            found = (yaml.safe_load(header[1]) or {}) if header else {}
        elif is_repository(source):
            with _reached(source):
                found = HfApi().model_info(source, timeout=TIMEOUT).card_data or {}
    except (UserError, ValueError, yaml.YAMLError):  # no network, or a damaged card: then it is not known
        return ""
    name = found.get("license") or ""
    return str(found.get("license_name") or name) if name == "other" else str(name)


def commit_of(source: str) -> str:
    """The commit that the repository is at; UserError where it cannot be had."""
    return _info(source).sha


def download(source: str, commit: str) -> Iterator[bytes]:
    """The wanted file, or several as a tar, as they are in a commit. Pickles are never fetched."""
    from huggingface_hub import hf_hub_download

    repository, _ = _split(source)
    names = wanted(source, [file.rfilename for file in _info(source, commit).siblings])
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        with _reached(source):
            files = [Path(hf_hub_download(repository, name, revision=commit, local_dir=folder)) for name in names]
        if len(files) > 1:
            packed = Path(folder) / "packed.tar"
            with tarfile.open(packed, "w", format=tarfile.GNU_FORMAT) as tar:
                for file in files:
                    member = tarfile.TarInfo(file.name)  # without owner and time: the same files, the same bytes
                    member.size = file.stat().st_size
                    with file.open("rb") as content:
                        tar.addfile(member, content)
            files = [packed]
        with files[0].open("rb") as content:
            while chunk := content.read(CHUNK):
                yield chunk


def wanted(source: str, names: list[str]) -> list[str]:
    """The files among `names` that are the weights; UserError where that cannot be told."""
    repository, path = _split(source)
    if path:
        if path not in names or not path.endswith((".safetensors", ".tar", ".tar.gz")):
            raise UserError(f"{repository} on the Hub has no weights {path}: give a .safetensors or .tar file of it.")
        return [path]
    top = [name for name in names if len(PurePosixPath(name).parts) == 1]
    if ARCHIVE in top:
        return [ARCHIVE]
    if "model_index.json" in top:
        raise UserError(f"{repository} on the Hub is a base model and no adapter: give it as base_model.")
    weights = [name for name in top if name.endswith(".safetensors")]
    chosen = [name for name in USUAL if name in weights][:1] or weights
    if not chosen:
        raise UserError(f"{repository} on the Hub holds no .safetensors file of weights; pickles are never read.")
    return list(dict.fromkeys([*chosen, *(name for name in BESIDE if name in top)]))


def _split(source: str) -> tuple[str, str]:
    """The repository, and the path of a file in it or nothing."""
    owner, name, *rest = source.split("/", 2)
    return f"{owner}/{name}", rest[0] if rest else ""


def _info(source: str, commit: str | None = None) -> ModelInfo:
    from huggingface_hub import HfApi

    with _reached(source):
        return HfApi().model_info(_split(source)[0], revision=commit, timeout=TIMEOUT)


@contextmanager
def _reached(source: str) -> Iterator[None]:
    """What goes wrong with the Hub, as the user's to mend; without the library's messages, which quote addresses."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"weights {source} are no file here, nor could {_split(source)[0]} be read on the Hub "
            f"({type(error).__name__}): check the name."
        ) from None
