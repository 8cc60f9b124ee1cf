"""Verdicts come while the caller waits or beside it; a verifier that fails is asked no more."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nemo_r3 import signals
from nemo_r3.errors import UserError
from nemo_r3.rollout.judge import Judge
from nemo_r3.tasks.protocol import Task
from nemo_r3.tasks.worker import Worker
from nemo_r3.types import NO_ROOM, Answer, Phase, Problem, Segment

PROBLEM = Problem("p", "Make 8.", {})


def answer(text: str, reason: str = "stop") -> Answer:
    return Answer(Segment(Phase.RETRY, (1,), (-1.0,), 0), text, reason)


def judge_by(verify: Any, threads: int) -> Judge:
    return Judge(cast(Task, SimpleNamespace(verify=verify)), threads)


@pytest.mark.parametrize("threads", [0, 2])
def test_verdicts_are_the_verifiers_own_and_what_nobody_wants_is_not_asked(threads: int) -> None:
    asked = []
    judge = judge_by(lambda problem, text: bool(asked.append(text)) or text == "8", threads)
    answers = [answer("8"), answer("7"), answer("8", NO_ROOM)]
    verdicts = [judge.ask(PROBLEM, it) for it in answers] + [judge.ask(PROBLEM, answer("unwanted"), wanted=False)]
    assert [judge.verdict(verdict) for verdict in verdicts] == [True, False, False, False]
    assert sorted(asked) == ["7", "8"]


def test_only_the_time_is_counted_for_which_somebody_waits() -> None:
    slow, beside = (judge_by(lambda *_: time.sleep(0.3) or True, threads) for threads in (0, 4))
    assert all([slow.verdict(slow.ask(PROBLEM, answer("8"))) for _ in range(4)])
    assert slow.seconds >= 1.2
    asked = [beside.ask(PROBLEM, answer("8")) for _ in range(4)]
    assert beside.seconds < 0.3
    assert all([beside.verdict(verdict) for verdict in asked])
    assert beside.seconds < 0.9, "four at once"


@pytest.mark.parametrize("threads", [0, 1])
def test_after_its_first_error_a_verifier_is_asked_no_more(threads: int) -> None:
    calls = []

    def verify(problem: Problem, text: str) -> bool:
        calls.append(text)
        raise UserError(f"the service is away: {text}")

    judge = judge_by(verify, threads)
    for text in ("first", "second"):
        judge.verdict(judge.ask(PROBLEM, answer(text)))
    assert calls == ["first"]
    assert str(judge.failure) == "the service is away: first"


def test_of_calls_that_fail_side_by_side_the_first_error_counts() -> None:
    both, failed = threading.Barrier(2, timeout=30), threading.Event()

    def verify(problem: Problem, text: str) -> bool:
        both.wait()
        assert text == "first" or failed.wait(30)
        raise UserError(text)

    judge = judge_by(verify, 2)
    first, second = (judge.ask(PROBLEM, answer(text)) for text in ("first", "second"))
    assert not judge.verdict(first)
    failed.set()
    assert not judge.verdict(second)
    assert str(judge.failure) == "first"


def test_a_signal_ends_the_wait_for_a_verdict_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    judge = judge_by(lambda *_: over.wait(20), 1)
    asked = [judge.ask(PROBLEM, answer("8")) for _ in range(2)]
    threading.Timer(0.1, lambda: monkeypatch.setattr(signals, "_noted", [("SIGUSR1", 0.0)])).start()
    assert not judge.verdict(asked[1])
    assert judge.seconds < 5
    over.set()
    monkeypatch.undo()
    assert judge.verdict(asked[1])


def test_each_thread_has_a_worker_of_its_own() -> None:
    pid, meet = Worker("os:getpid"), threading.Barrier(2, timeout=30)
    seen = []

    def verify(problem: Problem, text: str) -> bool:
        first = pid()
        seen.append(first)
        meet.wait()
        return pid() == first

    judge = judge_by(verify, 2)
    asked = [judge.ask(PROBLEM, answer(text)) for text in "ab"]
    assert all([judge.verdict(verdict) for verdict in asked])
    assert len({*seen, os.getpid()}) == 3
