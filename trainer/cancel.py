"""A cancel of Cog's, led past the place where it does harm.

It comes as an exception at any line of the thread that works, the lines of a library that is being imported among them.
What is cut off there is broken for the rest of the process, and with it every later job; or the cancel is lost there.
So a job works in a thread of its own, and a cancel is passed on to it when nothing is being imported.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")

POLL = 0.05  # seconds
AGAIN = 10.0  # seconds after which a cancel that had no effect is repeated: a callback may have swallowed it


def run(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; an exception thrown into the calling thread meanwhile stops it."""
    future: Future[Result] = Future()
    context = contextvars.copy_context()  # by which Cog knows whose logs and metrics these are
    thread = threading.Thread(target=context.run, args=(_settle, work, future), daemon=True)
    try:
        thread.start()
        while not future.done():
            wait([future], POLL)  # without a limit no exception would come through; Thread.join is broken by one
    except BaseException as cancel:
        stopped = threading.Event()
        threading.Thread(target=_stop, args=(thread, type(cancel), stopped), daemon=True).start()
        while not stopped.is_set():
            with suppress(BaseException):  # a second cancel: there is one on its way
                stopped.wait(POLL)
        raise
    return future.result()


def _settle(work: Callable[[], Result], future: Future[Result]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _stop(thread: threading.Thread, cancel: type[BaseException], stopped: threading.Event) -> None:
    while thread.is_alive():
        if _is_importing(thread):
            thread.join(POLL / 10)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(cancel))
            thread.join(AGAIN)
    stopped.set()


def _is_importing(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False
