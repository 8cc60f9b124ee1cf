"""`Worker`: results come back, and time, memory and errors of the function stay its own."""

from __future__ import annotations

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import psutil
import pytest

from nemo_r3.errors import UserError
from nemo_r3.tasks.worker import Worker


def test_results_come_back_until_time_runs_out_and_then_again() -> None:
    power = Worker("operator:pow", seconds=3)
    assert power(2, 10) == 1024
    began = time.monotonic()
    assert power(9, 10**9) is None  # one long instruction, which no signal interrupts
    assert time.monotonic() - began < 30
    assert power(3, 2) == 9


def test_it_works_in_a_process_with_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2000)), hard))
    try:
        with ExitStack() as files:
            for _ in range(1100):
                files.enter_context(open(os.devnull))
            assert Worker("operator:pow")(2, 10) == 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_is_limited() -> None:
    repeat = Worker("operator:mul", seconds=30, megabytes=512)
    assert repeat([0], 10**9) is None
    assert repeat([0], 2) == [0, 0]


FUNCTIONS = """
import os, subprocess, sys, time

def forks(value):
    return "copy" if value == "fork" and os.fork() == 0 else value

def reads():
    return sys.stdin.read()

def starts_and_hangs(file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(file, "w").write(str(child.pid))
    if os.fork() == 0:
        os.setsid()  # gets away, and keeps the worker's pipes open
        time.sleep(60)
    time.sleep(60)

def a_set():
    return {1}

def ends():
    os._exit(3)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("functions")
def test_a_function_that_forks_or_reads_gets_no_other_calls_result() -> None:
    call = Worker("functions:forks")
    assert [call(value) for value in ("a", "fork", "b", "c")] == ["a", "fork", "b", "c"]
    assert Worker("functions:reads")() == "", "not the next call"


@pytest.mark.usefixtures("functions")
def test_what_a_function_started_is_killed_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call, file = Worker("functions:starts_and_hangs", seconds=1), tmp_path / "pid"
    began = time.monotonic()
    assert call(str(file)) is None
    assert time.monotonic() - began < 30
    child = psutil.Process(int(file.read_text())) if psutil.pid_exists(int(file.read_text())) else None
    assert child is None or child.wait(5) is None or child.status() == psutil.STATUS_ZOMBIE
    assert call(str(file)) is None
    said = "warning: functions:starts_and_hangs took longer than 1 s: a call gives None then; "
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.usefixtures("functions")
def test_threads_have_processes_of_their_own_and_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    ends, pid, all_at_once = Worker("functions:ends"), Worker("os:getpid"), Barrier(3)

    def call(_: int) -> int:
        all_at_once.wait()
        assert ends() is None
        return pid()

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(call, range(3)))) == 3
    assert capsys.readouterr().err.count("warning: functions:ends") == 1


@pytest.mark.usefixtures("functions")
def test_a_process_that_ends_or_a_result_that_is_not_json_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert Worker("functions:ends", megabytes=900)() is None
    assert "functions:ends ran out of 900 MiB or ended its process (exit code 3)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"functions:a_set raised TypeError \(Object of type set is not JSON"):
        Worker("functions:a_set")()


def test_what_the_function_prints_or_raises_is_no_result() -> None:
    assert Worker("builtins:print")("noise") is None
    with pytest.raises(UserError, match="json:loads raised JSONDecodeError"):
        Worker("json:loads")("{")
    with pytest.raises(UserError, match="no_such_module:f cannot be imported"):
        Worker("no_such_module:f")()
