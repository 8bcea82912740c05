"""The cache of weights: what is downloaded when, what goes first, and that two processes can share it."""

from __future__ import annotations

import base64
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preprocessing.errors import UserError
from trainer.weights_cache import FOLDER_VARIABLE, SIZE_VARIABLE, WeightsCache


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes and ETag or None); notes what was asked and answered."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[bytes, str | None]] = {}
        self.answers: list[tuple[str, int]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        content, tag = self.server.files.get(path, (None, None))
        status = 404 if content is None else 304 if tag and self.headers["If-None-Match"] == tag else 200
        self.server.answers.append((path, status))
        self.send_response(status)
        if tag:
            self.send_header("ETag", tag)
        body = content if status == 200 else b""
        # a "short" file ends before the length that it declares
        self.send_header("Content-Length", str(len(body) + (100 if "short" in path else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests' output stays readable."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "cache", 1000)


def read(cache: WeightsCache, source: str) -> bytes:
    with cache.held(source) as held:
        return held.path.read_bytes()


def entries(cache: WeightsCache) -> list[bytes]:
    return sorted(path.read_bytes() for path in (cache.folder / "content").iterdir())


def url(content: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def test_an_address_is_downloaded_once(server: Server, cache: WeightsCache) -> None:
    server.files["/a.tar"] = (b"weights", None)
    assert [read(cache, f"{server.address}/a.tar") for _ in range(2)] == [b"weights"] * 2
    assert server.answers == [("/a.tar", 200)]


def test_a_server_that_names_versions_is_asked_for_a_newer_one(server: Server, cache: WeightsCache) -> None:
    address = f"{server.address}/a.tar"
    server.files["/a.tar"] = (b"old", "1")
    with cache.held(address) as first, cache.held(address) as again:
        assert first == again
    server.files["/a.tar"] = (b"newer", "2")
    with cache.held(address) as second:
        assert second.path.read_bytes() == b"newer" and second.key != first.key
    assert [status for _, status in server.answers] == [200, 304, 200]


def test_one_content_is_one_entry(server: Server, cache: WeightsCache) -> None:
    server.files |= {"/a": (b"same", None), "/b": (b"same", None)}
    with (
        cache.held(f"{server.address}/a?sig=1") as a,
        cache.held(f"{server.address}/b?sig=2") as b,
        cache.held(url(b"same")) as c,
    ):
        assert a == b == c
    assert entries(cache) == [b"same"]


def test_a_path_is_used_where_it_lies(cache: WeightsCache, tmp_path: Path) -> None:
    path = tmp_path / "mine.tar"
    path.write_bytes(b"1")
    with cache.held(str(path)) as first:
        assert first.path == path
    path.write_bytes(b"22")
    with cache.held(str(path)) as second:
        assert second.key != first.key
    assert not cache.folder.exists()


def test_what_was_not_used_for_the_longest_goes(cache: WeightsCache) -> None:
    a, b, c = (bytes([letter]) * 400 for letter in b"abc")
    for content in (a, b, a, c):  # a is used again before c comes
        read(cache, url(content))
    assert entries(cache) == [a, c]
    assert read(cache, url(b)) == b
    assert entries(cache) == [b, c]


def test_what_is_held_stays(cache: WeightsCache) -> None:
    a, b, c = (bytes([letter]) * 400 for letter in b"abc")
    with cache.held(url(a)) as held:
        read(cache, url(b))
        read(cache, url(c))
        assert held.path.read_bytes() == a
    assert entries(cache) == [a, c]


HOLD = """
import sys
from pathlib import Path
from trainer.weights_cache import WeightsCache
with WeightsCache(Path(sys.argv[1]), 1000).held(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_holds_stays_until_that_ends(cache: WeightsCache, root: Path) -> None:
    a, b, c, d = (bytes([letter]) * 400 for letter in b"abcd")
    command = [sys.executable, "-c", HOLD, str(cache.folder), url(a)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        read(cache, url(b))
        read(cache, url(c))
        assert entries(cache) == [a, c]
        other.kill()  # without a chance to tidy up
    read(cache, url(d))
    assert entries(cache) == [c, d]


FILL = """
import sys
from pathlib import Path
from trainer.weights_cache import WeightsCache
cache = WeightsCache(Path(sys.argv[1]), 1000)
for i in range(150):
    letter = "abcdefgh"[(i * int(sys.argv[2])) % 8]
    with cache.held("data:," + letter * 300) as held:
        assert held.path.read_bytes() == letter.encode() * 300
"""


def test_processes_that_fill_and_empty_it_at_once_read_whole_files(cache: WeightsCache, root: Path) -> None:
    commands = [[sys.executable, "-c", FILL, str(cache.folder), str(step)] for step in (1, 3, 5)]
    running = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    cache.shrink()
    assert 0 < sum(len(entry) for entry in entries(cache)) <= 1000
    assert list((cache.folder / "incoming").iterdir()) == []


@pytest.mark.parametrize("path", ["/gone.tar", "/short.tar"])
def test_a_failed_download_leaves_nothing_and_tells_no_secret(server: Server, path: str, cache: WeightsCache) -> None:
    server.files["/short.tar"] = (b"weights", None)
    address = f"{server.address}{path}?token=secret".replace("://", "://me:pw@")
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        read(cache, address)
    assert path in str(error.value) and "secret" not in str(error.value) and "pw" not in str(error.value)
    assert [p for p in cache.folder.rglob("*") if p.is_file()] == []


def test_a_failed_update_leaves_the_old_entry(server: Server, cache: WeightsCache) -> None:
    server.files["/short"] = (b"", "1")
    with pytest.raises(UserError):
        read(cache, f"{server.address}/short")
    server.files["/a"] = (b"old", "1")
    read(cache, f"{server.address}/a")
    del server.files["/a"]
    with pytest.raises(UserError, match="status 404"):
        read(cache, f"{server.address}/a")
    assert entries(cache) == [b"old"]


def test_a_server_that_is_not_there(cache: WeightsCache) -> None:
    with pytest.raises(UserError, match="cannot be downloaded"):
        read(cache, "http://127.0.0.1:9/none.tar")


def test_weights_larger_than_the_cache_are_refused(server: Server, cache: WeightsCache) -> None:
    server.files["/big"] = (b"x" * 1001, None)
    with pytest.raises(UserError, match=SIZE_VARIABLE):
        read(cache, f"{server.address}/big")
    assert entries(cache) == []


def test_a_damaged_note_is_no_note(server: Server, cache: WeightsCache) -> None:
    server.files["/a"] = (b"weights", None)
    read(cache, f"{server.address}/a")
    (note,) = (cache.folder / "sources").iterdir()
    for text in ("{", "[]", '{"content": 5}', '{"content": "../../x"}'):
        note.write_text(text)
        assert read(cache, f"{server.address}/a") == b"weights"


@pytest.mark.parametrize("source", ["nowhere.tar", "a b/c", "x" * 10_000, "zero\0byte", "/no/such/file", ""])
def test_nothing_there(source: str, cache: WeightsCache) -> None:
    with pytest.raises(UserError, match="do not exist") as error:
        read(cache, source)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("source", ["data:nothing", "data:;base64,%%%"])
def test_data_that_is_none(source: str, cache: WeightsCache) -> None:
    with pytest.raises(UserError, match="data: URL"):
        read(cache, source)


def test_folder_and_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SIZE_VARIABLE, "0.5")
    found = WeightsCache.from_environment()
    assert (found.folder, found.limit) == (tmp_path, 500_000_000)
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(SIZE_VARIABLE, wrong)
        with pytest.raises(UserError, match=SIZE_VARIABLE):
            WeightsCache.from_environment()
