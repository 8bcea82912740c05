"""Worker processes: everything comes out in order, little is held at a time, and no task takes others with it."""

import ctypes
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocessing.workers import AHEAD, FEWEST, Work, processes, run_all


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def misbehave(number: int, crash: tuple[int, ...] = (), hang: tuple[int, ...] = (), fail: int = -1) -> int:
    if number in crash:
        ctypes.string_at(0)
    if number in hang:
        time.sleep(60)
    if number == fail:
        raise TimeoutError("its own")
    return number


def given_up(number: int, reason: str) -> str:
    return f"{number} {reason}"


def test_results_come_in_order_from_other_processes():
    results = list(run_all(Work(square, given_up), range(40), 2))
    assert [result for result, _ in results] == [number**2 for number in range(40)]
    assert os.getpid() not in {process for _, process in results}
    assert [result for result, _ in run_all(Work(square, given_up), range(5), 0)] == [0, 1, 4, 9, 16]


def test_tasks_are_taken_as_results_are_fetched():
    taken = []
    results = run_all(Work(square, given_up), (taken.append(number) or number for number in range(1000)), 1)
    for _ in range(3):
        next(results)
    assert len(taken) <= AHEAD + 3
    results.close()


@pytest.mark.parametrize("crash", [(3, 4), (19,)])
def test_a_task_that_crashes_its_process_is_given_up_alone(crash):
    work = Work(functools.partial(misbehave, crash=crash), given_up)
    expected = [f"{n} its decoder crashed" if n in crash else n for n in range(20)]
    assert list(run_all(work, range(20), 2)) == expected


def test_a_task_that_hangs_is_given_up_and_its_process_is_gone():
    started = time.monotonic()
    work = Work(functools.partial(misbehave, hang=(2,)), given_up, timeout=3)
    assert list(run_all(work, range(4), 1)) == [0, 1, "2 its decoder took longer than 3 s", 3]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_of_the_function_is_raised(count):
    with pytest.raises(TimeoutError, match="its own"):
        list(run_all(Work(functools.partial(misbehave, fail=1), given_up), range(3), count))


def test_how_many_processes():
    assert processes(3, 1) == 3
    assert processes(0, 10**6) == 0
    assert processes(None, FEWEST - 1) == 0
    assert processes(None, FEWEST) == processes(None, None) >= 1


ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_workers import Work, given_up, run_all, square
if __name__ == "__main__":
    for _, process in run_all(Work(square, given_up), range(100), 1):
        print(process, flush=True)
        time.sleep(60)
"""


def test_workers_die_with_a_parent_that_is_killed(tmp_path, root):
    (tmp_path / "parent.py").write_text(ORPHANS, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "parent.py"), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")
