"""`Worker`: results come back, and time, memory and errors of the function stay its own."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack

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


def test_what_the_function_prints_or_raises_is_no_result() -> None:
    assert Worker("builtins:print")("noise") is None
    with pytest.raises(UserError, match="json:loads raised JSONDecodeError"):
        Worker("json:loads")("{")
    with pytest.raises(UserError, match="no_such_module:f cannot be imported"):
        Worker("no_such_module:f")()
