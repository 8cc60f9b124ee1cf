"""What a rollout makes of its turns; the engine is scripted, the real one is in test_engine.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pytest import MonkeyPatch
from transformers import AutoTokenizer

from nemo_r3 import signals
from nemo_r3.config import load
from nemo_r3.dialogue import Dialogue
from nemo_r3.errors import UserError, VerifierError
from nemo_r3.evaluate import EVALUATION_STEP
from nemo_r3.failures.bank import MINING_STEP
from nemo_r3.models import EMBEDDED
from nemo_r3.progress import Progress, Turns
from nemo_r3.rollout.sampling import UNFINISHED, Completion, Sampling
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.rollout.turn_cache import TurnCache, turn_id
from nemo_r3.runtime import World
from nemo_r3.tasks.protocol import Wording
from nemo_r3.types import NO_ROOM, Answer, Attempt, Phase, Problem, Segment

ROOT = Path(__file__).parents[2]
ALONE = cast(
    World,
    SimpleNamespace(rank=0, size=1, is_main=True, merge=dict, gather=lambda item: [item], leave_if_asked=lambda: None),
)


class Eight:
    name, verifier, wording = "eight", "eight-1", Wording()

    def problems(self, split: str) -> list[Problem]:
        return [Problem("p", "Make 8.", {})]

    def verify(self, problem: Problem, text: str) -> bool:
        return text.strip() == "8"


class Told(list[dict[str, Turns]]):
    """Notes all that a rollout reports, which it may at any time."""

    def __call__(self, counts: dict[str, Turns]) -> None:
        self.append(counts)

    def is_due(self) -> bool:
        return True


class Scripted:
    """Answers its requests, in the order they come, with these texts; `limits` are the most tokens they may have."""

    version, max_model_len = 0, 256

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts, self.resets = tokenizer, iter(texts), 0
        self.waiting, self.limits, self.prompts = list[str](), list[int](), list[list[int]]()
        self.experts_from = list[int | None]()
        self.progress = Told()

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self.waiting.append(request_id)
        self.limits.append(sampling.max_tokens)
        self.experts_from.append(sampling.experts_from)
        self.prompts.append(list(prompt_ids))

    def step(self) -> list[Completion]:
        ids = tuple(self.tokenizer.encode(next(self.texts), add_special_tokens=False))
        return [Completion(self.waiting.pop(0), ids, (-1.0,) * len(ids), "stop", 0)]

    def unfinished(self) -> dict[str, int]:
        return dict.fromkeys(self.waiting, 1)

    def abort(self) -> list[Completion]:
        return []

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def scripted(*texts: str, world: World = ALONE, threads: int = 0) -> tuple[Rollout, Eight, Scripted, Dialogue]:
    """A rollout whose engine says these texts, and what it is made of."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = load([str(ROOT / "configs" / "quickstart.yaml")])
    config.rollout.max_answer_tokens, config.rollout.max_reflection_tokens = 5, 9
    config.task.verifier_threads = threads
    task, engine = Eight(), Scripted(tokenizer, texts)
    dialogue = Dialogue(tokenizer, config.dialogue, task.wording)
    return Rollout(engine, dialogue, task, config, world, cast(Progress, engine.progress)), task, engine, dialogue


def test_a_reflection_and_its_retry_are_judged_apart_and_have_their_own_limits() -> None:
    rollout, task, engine, _ = scripted("9", "8", "7", "9", "8")
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    (group,) = rollout.reflect_and_retry([attempt], 1, group_size=2)
    assert [reflection.answer.text for reflection in group.reflections] == ["8", "7"]
    assert [reflection.solves for reflection in group.reflections] == [True, False]
    assert [reflection.passed for reflection in group.reflections] == [False, True]
    assert engine.limits == [5, 9, 9, 5, 5]
    assert engine.progress[0] == {Phase.ATTEMPT: (0, 1, 1, 1 / 5)}, "a turn under way: one token of five"
    retries = [counts[Phase.RETRY][:2] for counts in engine.progress if Phase.RETRY in counts]
    assert retries == [(0, 2), (0, 2), (0, 2), (1, 2), (2, 2), (2, 2)]
    assert engine.resets == 2, "what is cached does not depend on what came before"


def test_an_engine_makes_no_prompt_of_another(monkeypatch: MonkeyPatch) -> None:
    def merge(own: dict[int, Attempt]) -> dict[int, Attempt]:
        return dict.fromkeys(range(4), own[max(own)]) | own

    second = SimpleNamespace(**vars(ALONE) | {"rank": 1, "size": 2, "is_main": False, "merge": merge})
    rollout, _, _, dialogue = scripted("9", "8", world=cast(World, second))
    made: list[str] = []
    prompt_of = dialogue.task
    monkeypatch.setattr(dialogue, "task", lambda problem: made.append(problem.id) or prompt_of(problem))
    texts = {"a": "Make 8 of 1 and 7.", "b": "Make 8.", "c": "Make 9.", "d": "Make 8 of 3 and 5."}
    attempts = rollout.first_attempts([Problem(name, text, {}) for name, text in texts.items()], 1)
    assert made == ["c", "d"], "each engine has a long problem and a short one"
    assert [(attempt.problem.id, attempt.passed) for attempt in attempts[2:]] == [("c", False), ("d", True)]


def test_the_time_that_the_engine_waits_for_the_verifier_is_that_of_the_last_call() -> None:
    rollout, task, *_ = scripted("9", "8", "7", "9", "8", "9")
    judge = task.verify
    task.verify = lambda problem, text: time.sleep(0.05) or judge(problem, text)  # type: ignore[method-assign, func-returns-value]
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    rollout.reflect_and_retry([attempt], 1, group_size=2)
    assert rollout.judge.seconds >= 0.2, "two reflections and two retries"
    task.verify = judge  # type: ignore[method-assign]
    rollout.first_attempts(task.problems("train"), 2)
    assert rollout.judge.seconds < 0.2


def test_the_engine_samples_on_while_threads_verify(monkeypatch: MonkeyPatch) -> None:
    rollout, task, engine, _ = scripted("9", "8", "7", "9", "8", threads=1)
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    judge, step, over = task.verify, engine.step, threading.Event()

    def last_step() -> list[Completion]:
        completions = step()
        if len(engine.prompts) == 5 and not engine.waiting:
            over.set()
        return completions

    monkeypatch.setattr(engine, "step", last_step)
    monkeypatch.setattr(task, "verify", lambda problem, text: over.wait(20) and judge(problem, text))
    (group,) = rollout.reflect_and_retry([attempt], 1, group_size=2)
    assert [reflection.solves for reflection in group.reflections] == [True, False]
    assert [reflection.passed for reflection in group.reflections] == [False, True]


def test_a_verifier_that_fails_ends_the_rollout_with_its_message(monkeypatch: MonkeyPatch) -> None:
    rollout, task, engine, _ = scripted("9", "8", "7", "9", "8")
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)

    def verify(problem: Problem, text: str) -> bool:
        raise UserError(f"the service is away on {text}")

    monkeypatch.setattr(task, "verify", verify)
    with pytest.raises(VerifierError, match="the service is away on 8"):
        rollout.reflect_and_retry([attempt], 1, group_size=2)
    assert engine.waiting, "it samples no retries that nobody would judge"


def test_outside_of_training_a_verifiers_error_waits_for_no_other_engine(monkeypatch: MonkeyPatch) -> None:
    def verify(problem: Problem, text: str) -> bool:
        raise UserError("the service is away")

    rollout, task, *_ = scripted("9")
    monkeypatch.setattr(task, "verify", verify)
    monkeypatch.delattr(ALONE, "gather")
    with pytest.raises(VerifierError, match="the service is away"):
        rollout.first_attempts(task.problems("train"), MINING_STEP)


def test_in_training_a_verifiers_error_on_held_out_problems_is_one_of_all_ranks(monkeypatch: MonkeyPatch) -> None:
    def verify(problem: Problem, text: str) -> bool:
        raise UserError("the service is away")

    gathered: list[Any] = []
    rollout, task, *_ = scripted("9")
    monkeypatch.setattr(task, "verify", verify)
    monkeypatch.setattr(ALONE, "gather", lambda item: gathered.append(item) or [item])
    rollout.turns.begin(3)
    with pytest.raises(VerifierError, match="the service is away"):
        rollout.first_attempts(task.problems("test"), EVALUATION_STEP)
    assert len(gathered) == 1, "they save together"


def test_a_signal_is_a_stop_also_if_the_verifier_fails_of_it(monkeypatch: MonkeyPatch) -> None:
    rollout, task, *_ = scripted("9")

    def stop() -> None:
        raise signals.Stopped("stopped by SIGINT")

    def verify(problem: Problem, text: str) -> bool:
        monkeypatch.setattr(ALONE, "leave_if_asked", stop)
        raise UserError("its program was interrupted")

    monkeypatch.setattr(task, "verify", verify)
    with pytest.raises(signals.Stopped):
        rollout.first_attempts(task.problems("train"), 1)


def test_a_retry_after_a_given_reflection_sees_its_tokens_as_they_are() -> None:
    rollout, task, engine, dialogue = scripted("9", "8", "7", "9", "8")
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    (close,) = dialogue.end_of_turn
    ended, cut, unasked = (
        Answer(Segment(Phase.REFLECTION, ids, (-1.0,) * len(ids), 0), "8", reason)
        for ids, reason in (((40, 41, close), "stop"), ((40, 41), "length"), ((), NO_ROOM))
    )
    failures = [replace(attempt, sample=sample) for sample in range(3)]
    found = rollout.retry_after(failures, [ended, cut, unasked], 1)
    assert [reflection.retry.text for reflection in found] == ["8", "7", ""]
    assert [reflection.passed for reflection in found] == [True, False, False]
    assert not any(reflection.solves for reflection in found), "8 passes, but nobody asked"
    assert engine.progress[-1] == {Phase.RETRY: (3, 3, sum(len(it.retry.segment.ids) for it in found), 0.0)}
    asked = dialogue.reflect(attempt.context, attempt.problem)
    for prompt, reflection in zip(engine.prompts[1:], found, strict=False):
        assert prompt[: len(asked) + 3] == [*asked.ids, 40, 41, close]
        assert reflection.trajectory.ids == [*prompt, *reflection.retry.segment.ids]


def test_experts_are_asked_for_once_and_only_where_a_row_has_them() -> None:
    """Of a group's context with its first reflection; of what follows each with its own turn."""
    rollout, task, engine, dialogue = scripted("9", *"8787" * 4)
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    prompt = len(dialogue.reflect(attempt.context, attempt.problem))

    def asked(step: int) -> list[int | None]:
        engine.experts_from.clear()
        rollout.reflect_and_retry([attempt], step, group_size=2)
        return engine.experts_from

    config = rollout._config
    assert asked(1) == [None] * 4
    config.actor.routing_replay = True
    assert asked(1) == [0, prompt, None, None]
    config.algo.trained_phases = ["retry"]
    assert asked(1) == [0, prompt, prompt, prompt], "a reflection of one token has none of its own"
    assert asked(-1) == [None] * 4, "held-out problems"


def test_a_turn_that_goes_on_asks_for_the_experts_that_are_not_known() -> None:
    rollout, task, engine, dialogue = scripted("9", "8", "7", "7", "7")
    (attempt,) = rollout.first_attempts(task.problems("train"), 1)
    prompt = dialogue.reflect(attempt.context, attempt.problem)
    rollout._config.actor.routing_replay = True
    rollout.turns = TurnCache(enabled=True)
    begun = Completion("", (40, 41, 42), (-1.0,) * 3, UNFINISHED, 0)
    rollout.turns.restore(1, {turn_id(Phase.REFLECTION, prompt, attempt.id, 1): begun})
    engine.experts_from.clear()
    rollout.reflect_and_retry([attempt], 1, group_size=2)
    assert engine.experts_from == [0, len(prompt) + 2, None, None]
