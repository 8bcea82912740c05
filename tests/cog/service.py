"""Cog's real server, started and talked to: without pytest, so that a clean root can run it as well."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cog.schema import openapi

STUBS = {
    "train": ("COG_TRAIN_TYPE_STUB", "train.py:train"),
    "predict": ("COG_PREDICT_TYPE_STUB", "predict.py:Predictor"),
}
ENDED = ("succeeded", "failed", "canceled")
PROJECT = ("train.py", "predict.py", "trainer", "preprocessing", "toybox", "recipes")


@dataclass(frozen=True)
class Answer:
    """Status and JSON of one answer."""

    status: int
    body: Any


class Service:
    """A server that is ready; `kind` is "trainings" or "predictions"."""

    def __init__(self, address: str, kind: str, process: subprocess.Popen[bytes], log: Path):
        self.address, self.kind, self.process, self.log = address, kind, process, log

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=600) as answer:
                return Answer(answer.status, _parsed(answer.read()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, _parsed(error.read()))

    def run(self, given: dict[str, Any], **rest: Any) -> dict[str, Any]:
        """Ask and wait for the end; the answer's body."""
        return self._ask("POST", f"/{self.kind}", {"input": given} | rest).body

    def start(self, name: str, given: dict[str, Any], **rest: Any) -> Answer:
        """Ask, and do not wait."""
        return self._ask("PUT", f"/{self.kind}/{name}", {"input": given} | rest, Prefer="respond-async")

    def _ask(self, *arguments: Any, **headers: str) -> Answer:
        """A call, repeated for as long as a worker is busy that has already answered the one before."""
        answer = self.call(*arguments, **headers)
        for _ in range(250):
            if answer.status != 409:
                break
            time.sleep(0.02)
            answer = self.call(*arguments, **headers)
        return answer

    def poll(self, name: str, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Every state of a running one that was seen until `until` holds or it ended.

        Asking for it once more tells its state, and would start it once more after its end if the inputs were right.
        """
        seen: list[dict[str, Any]] = []
        while not (seen and until(seen[-1])):
            answer = self.start(name, {})
            if answer.status == 422:
                break
            assert answer.status == 202, answer
            seen.append(answer.body)
            time.sleep(0.05)
        return seen

    def busy(self) -> bool:
        return self.call("GET", "/health-check").body["status"] == "BUSY"

    def idle(self, seconds: float) -> float:
        """Wait until the worker is free; the seconds that it took."""
        started = time.monotonic()
        while self.busy():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"still busy after {seconds} s")
            time.sleep(0.02)
        return time.monotonic() - started


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(mode: str, folder: Path, *options: str, **environment: str) -> Iterator[Service]:
    """Cog's server in "train" or "predict" mode, with `folder` (see `checkout`) as its working directory."""
    port = free_port()
    variable, stub = STUBS[mode]
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the worker is started as plain `python`
        "PORT": str(port),
        variable: stub,
        "NO_PROXY": "127.0.0.1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--x-mode", mode, *options]
    log = folder / f"{mode}-{port}.log"
    with log.open("wb") as target:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **own, **environment}, stdout=target, stderr=subprocess.STDOUT
        )
    kind = {"train": "trainings", "predict": "predictions"}[mode]
    service = Service(f"http://127.0.0.1:{port}", kind, process, log)
    try:
        _wait_until_ready(service)
        yield service
    finally:
        with contextlib.suppress(OSError):
            service.call("POST", "/shutdown")
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(service: Service) -> None:
    for _ in range(1200):
        with contextlib.suppress(OSError):
            status = service.call("GET", "/health-check").body["status"]
            if status == "READY":
                return
            if "FAILED" in status:
                break
        if service.process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready:\n{service.log.read_text(errors='replace')[-3000:]}")


def checkout(root: Path, folder: Path) -> Path:
    """A working directory with the project and its schema in it, and room for what the server writes."""
    (folder / ".cog").mkdir(parents=True)
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(openapi()), encoding="utf-8")
    for name in PROJECT:
        (folder / name).symlink_to(root / name)
    return folder


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def members(archive: bytes) -> dict[str, bytes]:
    """The files in an archive of weights."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def weights(archive: bytes) -> dict[str, bytes]:
    """Those of them that hold weights, without the time at which they were made."""
    found = {name: content for name, content in members(archive).items() if name.endswith(".safetensors")}
    return {name: re.sub(rb'"modelspec.date":"[^"]*"', b"", content, count=1) for name, content in found.items()}


def content(url: str) -> bytes:
    """What is in a base64 data: URL."""
    return base64.b64decode(url.partition(",")[2])
