"""A child process that answers one line of JSON with one line of JSON, and everything that goes wrong with one.

    here --{"...": ...}--> stdin  |  stdout --{"ready": true}, then an answer a question--> here
                                  |  stderr --its last lines are kept for the message

Both outputs are read by threads of their own, for a full pipe would stop the child. What a library prints into stdout
is no JSON and is passed over. The child is the head of a process group, so that killing it leaves nothing of it; it
dies by itself when its stdin ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# They would lead the child's Python to packages of this one, or to the wrong one.
OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP", "__PYVENV_LAUNCHER__")
KEPT_LINES = 20  # of stderr
GRACE = 5.0  # seconds to end by itself


class WorkerFailed(Exception):
    """The child died, hung or never started; the message ends in what it last said."""


class JsonWorker:
    """Starts `command` in `folder` and waits for its {"ready": true}; a context manager.

    Raises WorkerFailed where that does not come within `start_timeout` seconds.
    """

    def __init__(self, command: Sequence[str | Path], folder: Path, start_timeout: float):
        environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=KEPT_LINES)
        self._readers = [
            threading.Thread(target=self._read_answers, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._answer(start_timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> JsonWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The child's answer; raises WorkerFailed, the child being gone, where none comes within `timeout` seconds."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure("ended") from error
        return self._answer(timeout)

    def close(self) -> None:
        """End the child and all that it started; harmless to call twice."""
        if not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                self._kill()  # it is gone, with something unread
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._kill()
        for reader in self._readers:
            reader.join(GRACE)

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended just now
        self._process.wait()

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._kill()
            raise self._failure(f"gave no answer in {timeout:g} s") from None
        if answer is None:
            raise self._failure("ended")
        return answer

    def _failure(self, what: str) -> WorkerFailed:
        deadline = time.monotonic() + GRACE
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._readers[1].join(GRACE)
        code = self._process.poll()
        said = " | ".join(line for line in self._said if line.strip())
        return WorkerFailed(f"{what} (exit code {code}): {said or 'it said nothing'}")

    def _read_answers(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                answer = json.loads(line)
            except ValueError:
                self._said.append(line.strip())
                continue
            if isinstance(answer, dict):
                self._answers.put(answer)
        self._answers.put(None)

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self._said.append(line.strip())
