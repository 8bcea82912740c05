"""One function over many tasks in worker processes: in order, a few tasks ahead at a time, and no task ends the others.

A decoder is C code fed with strangers' files: it may crash or hang. Then the tasks that were under way are done again,
each in a process of its own, and the one that fails there is given up.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks a process that wait or are done and not yet fetched: what bounds the memory
FEWEST = 64  # tasks below which starting processes takes longer than they save
MOST = 8  # processes by default; each may hold a picture at its full size


@dataclass(frozen=True)
class Work(Generic[Task, Result]):
    """What is done: `function` of each task, or `given_up` (in this process) of one on which a process died or hung.

    Both must be importable functions, or partials of such.
    """

    function: Callable[[Task], Result]
    given_up: Callable[[Task, str], Result]
    timeout: float = 300.0  # seconds a task


def processes(wanted: int | None, tasks: int | None) -> int:
    """How many worker processes to use, 0 for none, given the setting and the number of tasks if that is known."""
    if multiprocessing.current_process().daemon:  # which may have no children
        return 0
    if wanted is not None:
        return wanted
    if tasks is not None and tasks < FEWEST:
        return 0
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_all(work: Work[Task, Result], tasks: Iterable[Task], count: int) -> Iterator[Result]:
    """The results in the order of the tasks, by `count` processes, or by this one where that is 0."""
    if count == 0:
        yield from map(work.function, tasks)
        return
    waiting = iter(tasks)
    while failed := (yield from _until_broken(work, waiting, count)):
        # Whose fault it was is not known: one by one it shows.
        for task in failed:
            yield _alone(work, task)


def _until_broken(work: Work[Task, Result], tasks: Iterator[Task], count: int) -> Generator[Result, None, list[Task]]:
    """Results until the tasks or the pool come to an end; returns the tasks that the pool took with it."""
    under_way: deque[tuple[Task, Future[Result]]] = deque()
    pool = _pool(count)
    try:
        while True:
            for task in itertools.islice(tasks, AHEAD * count - len(under_way)):
                try:
                    under_way.append((task, pool.submit(work.function, task)))
                except BrokenProcessPool:
                    return [*(one for one, _ in under_way), task]
            if not under_way:
                return []
            try:
                result = under_way[0][1].result(work.timeout)
            except (BrokenProcessPool, TimeoutError) as error:
                if under_way[0][1].done() and not isinstance(error, BrokenProcessPool):
                    raise  # the function's own
                return [task for task, _ in under_way]
            under_way.popleft()
            yield result
    finally:
        _end(pool)


def _alone(work: Work[Task, Result], task: Task) -> Result:
    pool = _pool(1)
    future = pool.submit(work.function, task)
    try:
        return future.result(work.timeout)
    except BrokenProcessPool:
        return work.given_up(task, "its decoder crashed")
    except TimeoutError:
        if future.done():
            raise
        return work.given_up(task, f"its decoder took longer than {work.timeout:g} s")
    finally:
        _end(pool)


def _pool(count: int) -> ProcessPoolExecutor:
    # Not fork: a copy of a process in which torch has threads may stand still.
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let this worker die when the process that started it does: one that is killed takes nothing along by itself."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(pool: ProcessPoolExecutor) -> None:
    """Let nothing queued start, and kill what hangs: an interrupt need not wait for every picture."""
    children = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for child in children:
        child.terminate()
    for child in children:
        child.join()
