"""Work in a thread of its own, and an exception thrown into the thread that waits for it, as Cog throws one."""

from __future__ import annotations

import contextvars
import ctypes
import importlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import cancel

SLOW_MODULE = "import time\nfor _ in range(100):\n    time.sleep(0.005)\nwhole = True\n"


class Cancelled(BaseException):
    """As Cog's: no Exception."""


def throw_into(thread: int, when: Callable[[], bool]) -> threading.Thread:
    """Throw a Cancelled into a thread as soon as `when` holds."""

    def wait() -> None:
        while not when():
            time.sleep(0.001)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Cancelled))

    thrower = threading.Thread(target=wait)
    thrower.start()
    return thrower


def test_result_error_and_context_come_through() -> None:
    variable = contextvars.ContextVar("variable", default="nobody's")
    variable.set("mine")
    assert cancel.run(variable.get) == "mine"
    with pytest.raises(ZeroDivisionError):
        cancel.run(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        cancel.run(sys.exit)


def test_a_cancel_stops_the_work_in_its_place() -> None:
    seen: list[str] = []

    def work() -> None:
        try:
            seen.append("started")
            while True:
                time.sleep(0.001)
        finally:
            seen.append("cleaned up")

    thrower = throw_into(threading.get_ident(), lambda: bool(seen))
    started = time.monotonic()
    with pytest.raises(Cancelled):
        cancel.run(work)
    thrower.join()
    assert seen == ["started", "cleaned up"]  # by then, not some time later
    assert time.monotonic() - started < 1


def test_what_is_being_imported_is_imported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    went_on: list[bool] = []

    def work() -> None:
        importlib.import_module("slow_to_import")
        while True:
            time.sleep(0.001)
            went_on.append(True)

    thrower = throw_into(threading.get_ident(), lambda: "slow_to_import" in sys.modules)
    with pytest.raises(Cancelled):
        cancel.run(work)
    thrower.join()
    assert sys.modules.pop("slow_to_import").whole
    assert len(went_on) < 100


def test_a_cancel_that_was_swallowed_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "AGAIN", 0.05)
    swallowed: list[bool] = []

    def endless() -> None:
        while True:
            time.sleep(0.001)

    def work() -> None:
        try:
            swallowed.append(False)
            endless()
        except Cancelled:
            swallowed.append(True)
        endless()

    thrower = throw_into(threading.get_ident(), lambda: bool(swallowed))
    with pytest.raises(Cancelled):
        cancel.run(work)
    thrower.join()
    assert swallowed == [False, True]
