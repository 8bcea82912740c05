"""Weights from anywhere, as a file that lies here: a path, a data: URL, an http(s) URL or a Hub id.

    sources/<sha256 of the address>   which content the address had, and what its server calls that version
    content/<sha256 of the bytes>     the bytes; read anew, an entry becomes the youngest
    incoming/                         what is still being written; linked into content/ when it is whole

Two addresses of one content are one entry. Beyond the size limit the entries not used for the longest go, except those
that somebody holds: a holder keeps a shared lock on the file (released by the system when a process dies), and nobody
removes what it cannot lock alone. So any number of processes may share one folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests

from preprocessing.errors import UserError, redacted
from trainer import hub
from trainer.hosted import decoded, reason

FOLDER_VARIABLE, SIZE_VARIABLE = "ATELIER_WEIGHTS_CACHE", "ATELIER_WEIGHTS_CACHE_GB"
DEFAULT_GB = 20.0
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**20
ABANDONED = 24 * 3600  # seconds after which a file in incoming/ is of a process that died
VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}


@dataclass(frozen=True)
class Held:
    """Weights that lie in `path`; `key` changes when they do."""

    path: Path
    key: str


class WeightsCache:
    """A folder of downloaded weights of at most `limit` bytes; see the module's head."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    @classmethod
    def from_environment(cls) -> WeightsCache:
        """The folder and the size (10^9 bytes) that the environment names, or the user's own cache folder and 20."""
        around = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(around) / "atelier" / "weights")
        text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
        try:
            limit = int(float(text) * 10**9)
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise UserError(f"{SIZE_VARIABLE} should be a number of gigabytes above 0, not {text!r}")
        return cls(folder, limit)

    @contextmanager
    def held(self, source: str) -> Iterator[Held]:
        """The weights that `source` names, which stay while the context is open. UserError where there are none."""
        with ExitStack() as stack:
            if source.startswith(("http://", "https://")):
                yield self._kept(source, stack, lambda known: _download(source, known))
            elif source.startswith("data:"):
                # its own name: the content decides
                content = decoded(source, "the weights")
                yield self._kept(hashlib.sha256(content).hexdigest(), stack, _once(lambda: [content]))
            elif _is_here(source):
                path = Path(source)
                state = path.stat()
                yield Held(path, f"{path.resolve()} {state.st_mtime_ns} {state.st_size}")
            elif hub.ID.fullmatch(source):
                commit = hub.commit_of(source)
                yield self._kept(f"{source}@{commit}", stack, _once(lambda: hub.download(source, commit)))
            else:
                raise UserError(
                    f"weights {redacted(source)[:100]} do not exist: give the path or URL of a trained_model.tar or a "
                    ".safetensors file, or a Hub id."
                )

    def _kept(self, address: str, stack: ExitStack, fetch: Any) -> Held:
        """The entry that `address` has, fetched where it is not here or not what its server has by now.

        `fetch` takes what is known of the entry here ({} for nothing) and returns what is to be known and the chunks;
        None for the chunks where the entry is still right.
        """
        for name in ("sources", "content", "incoming"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        note = self.folder / "sources" / hashlib.sha256(address.encode()).hexdigest()
        known = _read_note(note)
        entry = self._take(known.get("content"), stack)
        known, chunks = fetch(known if entry else {})
        if entry is None or chunks is not None:
            entry = self._store(chunks, stack)
            _write_whole(note, json.dumps({**known, "content": entry.name}))
            self.shrink()
        return Held(entry, entry.name)

    def _take(self, name: Any, stack: ExitStack) -> Path | None:
        """Lock an entry that is here, and make it the youngest."""
        if not isinstance(name, str):
            return None
        path = self.folder / "content" / name
        try:
            file = path.open("rb")
        except OSError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_at(file, path):  # removed between opening and locking
            file.close()
            return None
        stack.callback(file.close)
        os.utime(path)
        return path

    def _store(self, chunks: Iterable[bytes], stack: ExitStack) -> Path:
        """Write the chunks into an entry, whole, and lock it from its first byte on."""
        digest, size = hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(dir=self.folder / "incoming")
        file = stack.enter_context(os.fdopen(handle, "wb"))
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > self.limit:
                    raise UserError(
                        f"these weights are larger than the cache of {self.limit / 1e9:g} GB: set {SIZE_VARIABLE}."
                    )
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            path = self.folder / "content" / digest.hexdigest()
            while (entry := self._take(path.name, stack)) is None:
                # not renamed over another's of the same bytes: that one's holders have locked the file, not the name
                with suppress(FileExistsError):
                    os.link(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        return entry

    def shrink(self) -> None:
        """Remove the entries not used for the longest until the rest fits, sparing those that are held."""
        entries = []
        for path in (self.folder / "content").iterdir():
            with suppress(FileNotFoundError):  # another process was quicker
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            if _remove_unless_held(path):
                total -= size
        for path in (self.folder / "incoming").iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    _remove_unless_held(path)


def _once(chunks: Callable[[], Iterable[bytes]]) -> Callable[[dict[str, str]], tuple[dict[str, str], Any]]:
    """How what never changes is fetched: not at all where it is here."""
    return lambda known: (known, None) if known else ({}, chunks())


def _is_here(source: str) -> bool:
    """Whether it is a path of something; a text that no path could be is not."""
    try:
        return source != "" and Path(source).exists()
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


def _remove_unless_held(path: Path) -> bool:
    """Whether the file is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), found)


def _read_note(path: Path) -> dict[str, str]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged: fetched again
        return {}
    return note if isinstance(note, dict) else {}


def _write_whole(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def _download(url: str, known: Mapping[str, str]) -> tuple[dict[str, str], Iterator[bytes] | None]:
    """What the server calls its version, and the bytes; None for them where the server says that `known` is it.

    A server that names no version is believed to keep an address's content: it is asked once.
    """
    wanted = {VALIDATORS[name]: value for name, value in known.items() if name in VALIDATORS}
    if known and not wanted:
        return dict(known), None
    try:
        answer = requests.get(url, stream=True, timeout=TIMEOUT, headers=wanted)
        if answer.status_code == requests.codes.not_modified:
            answer.close()
            return dict(known), None
        answer.raise_for_status()
    except requests.RequestException as error:
        raise _refused(url, error) from None
    return {name: answer.headers[name] for name in VALIDATORS if name in answer.headers}, _body(url, answer)


def _body(url: str, answer: requests.Response) -> Iterator[bytes]:
    with answer:
        try:
            yield from answer.iter_content(CHUNK)
        except requests.RequestException as error:
            raise _refused(url, error) from None


def _refused(url: str, error: requests.RequestException) -> UserError:
    """Says what went wrong without the library's message, which repeats the address with all that is secret in it."""
    return UserError(f"weights {redacted(url)} cannot be downloaded ({reason(error)}): check the URL")
