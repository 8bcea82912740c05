"""The world around a server, on 127.0.0.1: files to fetch, a place to upload to, a webhook."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Outside:
    """Serves `files` (path -> bytes), keeps what is PUT there too, and every JSON that is POSTed to a path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.hooks: dict[str, list[dict[str, Any]]] = {}
        self.address = ""

    def url(self, path: str, user: str = "", query: str = "") -> str:
        """The address of a path, with a secret or two in it if wanted."""
        return self.address.replace("://", f"://{user}@" if user else "://") + path + query

    def told(self, path: str, until: Callable[[dict[str, Any]], bool], seconds: float = 60) -> list[dict[str, Any]]:
        """What a webhook got, waiting until `until` holds for one of them; that one is last, for webhooks overtake."""
        end = time.monotonic() + seconds
        while not any(until(one) for one in self.hooks.get(path, [])):
            if time.monotonic() > end:
                raise TimeoutError(f"webhook {path} got only {self.hooks.get(path)}")
            time.sleep(0.05)
        return sorted(self.hooks[path], key=until)


def _handler(world: Outside) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            world.fetched.append(path)
            content = world.files.get(path)
            self._answer(200 if content is not None else 404, content or b"")

        def do_PUT(self) -> None:
            world.files[urlsplit(self.path).path] = self._body()
            self._answer(200)

        def do_POST(self) -> None:
            world.hooks.setdefault(urlsplit(self.path).path, []).append(json.loads(self._body()))
            self._answer(200)

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers["Content-Length"]))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, content: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: its lines are of no interest to a test."""

    return Handler


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """A running Outside."""
    world = Outside()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(world)) as server:
        world.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield world
        finally:
            server.shutdown()
            thread.join()
