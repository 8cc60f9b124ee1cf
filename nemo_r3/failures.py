"""Where failed first attempts come from: a bank mined once (as in the paper), or the current policy.

failures/bank.json          what mined it: model, task, verifier, dialogue, sampling; and how it went
failures/shard_00000.jsonl  the rejected answers to a fixed slice of the problems, written whole: mining resumes
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.rollout.scheduler import Attempted, Rollout
from nemo_r3.run_directory import take_lock, write_whole
from nemo_r3.runtime import World
from nemo_r3.types import Answer, Failure, Phase, Problem, Segment, Trajectory

SHARD_PROBLEMS = 512
MINING_STEP = 0
ONLINE_ROUNDS = 50
"""How many batches of problems `OnlineSource` tries before it concludes that the policy solves them all."""


@dataclass(frozen=True)
class Stamp:
    """What a bank's answers depend on.

    Attributes:
        model: fingerprint of the checkpoint that answered.
        problems: `hash_of` the problems that were asked: another split, text or right answer is another bank.
        task: its name.
        verifier: its version and settings.
        dialogue: fingerprint of template and wording.
        temperature: of the answers.
        max_answer_tokens: of the answers.
        samples_per_problem: answers drawn for each problem.
    """

    model: str
    problems: str
    task: str
    verifier: str
    dialogue: str
    temperature: float
    max_answer_tokens: int
    samples_per_problem: int


def hash_of(problems: Iterable[Problem]) -> str:
    """Changes with any problem's id, text, data or tools, and with their order."""
    found = hashlib.sha256()
    for problem in problems:
        found.update(json.dumps([problem.id, problem.text, problem.data, problem.tools]).encode() + b"\n")
    return found.hexdigest()[:16]


class Bank:
    """A directory of mined failures. Rank 0 writes; all ranks read."""

    def __init__(self, config: Config, stamp: Stamp, world: World) -> None:
        """Names the bank; nothing is read yet."""
        self.path = Path(config.failures.path)
        self._config, self._stamp, self._world = config.failures, stamp, world
        self._index = self.path / "bank.json"

    def check(self) -> bool:
        """Whether the bank is complete; a missing or half-mined one is not.

        Raises:
            UserError: it was mined from another model, task, verifier, dialogue or sampling.
        """
        if not self._index.exists():
            if any(self.path.glob("shard_*.jsonl")):
                raise UserError(f"failures.path: {self.path} has shards but no bank.json to say whose; remove them")
            return False
        try:
            index = json.loads(self._index.read_text())
            found = index["stamp"]
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"failures.path: {self._index} is damaged ({error}); remove {self.path}") from error
        wanted = vars(self._stamp)
        differing = [f"{key} {found.get(key)!r} != {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
        complete = bool(index.get("complete"))
        if differing and not (self._config.allow_foreign and complete):
            raise UserError(
                f"failures.path: {self.path} was mined with another {', '.join(differing)}; mine a new bank at another "
                "failures.path, or accept this one, if it is complete, with failures.allow_foreign=true"
            )
        return complete

    def mine(self, rollout: Rollout, problems: Sequence[Problem]) -> None:
        """Samples first answers to the problems, shard by shard, and keeps every one that the verifier rejects."""
        samples = self._config.samples_per_problem
        if self._world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            take_lock(self.path)
            self._write_index(complete=False, problems=len(problems))
        shards = [self.path / f"shard_{number:05d}.jsonl" for number in range(-(-len(problems) // SHARD_PROBLEMS))]
        missing = self._world.broadcast([not shard.exists() for shard in shards])
        for number, shard in enumerate(shards):
            if missing[number]:
                asked = problems[number * SHARD_PROBLEMS : (number + 1) * SHARD_PROBLEMS]
                attempts = rollout.first_attempts(asked, MINING_STEP, samples)
                if self._world.is_main:
                    write_whole(shard, "".join(f"{json.dumps(row)}\n" for row in _rows(attempts, samples)))
        if self._world.is_main:
            self._write_index(complete=True, problems=len(problems))
        self._world.barrier()

    def read(self) -> list[Failure]:
        """All failures that `failures.max_solve_rate` lets through, in the order of the problems.

        Raises:
            UserError: there are none, or a shard is damaged.
        """
        failures = []
        for shard in sorted(self.path.glob("shard_*.jsonl")):
            for number, line in enumerate(shard.read_text().splitlines(), 1):
                try:
                    row = json.loads(line)
                    if row["solve_rate"] <= self._config.max_solve_rate:
                        failures.append(_failure(row))
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(
                        f"failures.path: {shard}:{number} is damaged ({error!r}); remove {self.path}, and it is "
                        "mined again"
                    ) from error
        if not failures:
            raise UserError(
                f"failures.path: the bank {self.path} holds no failures: every first answer passed, or "
                f"failures.max_solve_rate={self._config.max_solve_rate} left all of them out; there is nothing to "
                "reflect on"
            )
        return failures

    def _write_index(self, **entries: Any) -> None:
        write_whole(self._index, json.dumps({"stamp": vars(self._stamp), **entries}, indent=1) + "\n")


def _rows(attempts: Sequence[Attempted], samples: int) -> list[dict[str, Any]]:
    """The bank's rows: rejected answers that have tokens to reflect on."""
    rows = []
    for first in range(0, len(attempts), samples):
        answers = attempts[first : first + samples]
        solve_rate = sum(attempt.passed for attempt in answers) / samples
        rows += [_row(attempt, solve_rate) for attempt in answers if attempt.is_failure]
    return rows


def _row(attempt: Attempted, solve_rate: float) -> dict[str, Any]:
    answer = attempt.answer
    return {
        "problem_id": attempt.problem.id,
        "problem": {
            "text": attempt.problem.text,
            "data": attempt.problem.data,
            "tools": attempt.problem.tools,
        },
        "sample": attempt.sample,
        "solve_rate": round(solve_rate, 4),
        "task_ids": attempt.context.segments[0].ids,
        "attempt": answer.text,
        "attempt_ids": answer.segment.ids,
        "attempt_logprobs": [round(value, 6) for value in answer.segment.logprobs],
        "finish_reason": answer.finish_reason,
        "weights_version": answer.segment.version,
    }


def _failure(row: Mapping[str, Any]) -> Failure:
    """The inverse of `_row`."""
    asked = row["problem"]
    problem = Problem(row["problem_id"], asked["text"], asked["data"], tuple(asked["tools"]))
    task = Segment(Phase.TASK, tuple(row["task_ids"]))
    segment = Segment(Phase.ATTEMPT, tuple(row["attempt_ids"]), tuple(row["attempt_logprobs"]), row["weights_version"])
    answer = Answer(segment, row["attempt"], row["finish_reason"])
    return Failure(problem, Trajectory((task, segment)), answer, row["sample"])


class Source(Protocol):
    """Gives each training step its failures.

    Attributes:
        cursor: how far it has come; a checkpoint keeps it.
    """

    cursor: int

    def draw(self, step: int) -> list[Failure]:
        """The failures of a step, the same on every rank."""
        ...


class BankSource:
    """Walks through a bank in a new seeded order each epoch; what is left at an epoch's end is dropped."""

    def __init__(self, failures: Sequence[Failure], count: int, seed: int) -> None:
        """Gives `count` failures a step.

        Raises:
            UserError: the bank is smaller than a step.
        """
        if len(failures) < count:
            raise UserError(
                f"failures.path: the bank holds {len(failures)} failures, fewer than train.failures_per_step={count}; "
                "mine more problems or samples, or lower it"
            )
        self.cursor = 0
        self._failures, self._count, self._seed = failures, count, seed

    def draw(self, step: int) -> list[Failure]:
        """The next `count` failures; `step` does not matter."""
        epoch, place = divmod(self.cursor, len(self._failures) // self._count)
        order = epoch_order(len(self._failures), self._seed, epoch)
        self.cursor += 1
        return [self._failures[i] for i in order[place * self._count : (place + 1) * self._count]]


class OnlineSource:
    """Draws first attempts from the current policy and keeps those it fails."""

    def __init__(self, rollout: Rollout, problems: Sequence[Problem], count: int, seed: int) -> None:
        """Gives `count` failures a step, from as many problems as that takes.

        Raises:
            UserError: there is no problem to ask.
        """
        if not problems:
            raise UserError("failures.source=online: the task has no training problems; lower task.options.test_size")
        self.cursor = 0
        self._rollout, self._problems, self._count, self._seed = rollout, problems, count, seed

    def draw(self, step: int) -> list[Failure]:
        """Asks batch after batch of problems, none of them twice, until `count` answers were rejected.

        Raises:
            UserError: too few were, over many batches or all problems.
        """
        failures: list[Failure] = []
        asked: set[int] = set()
        for _ in range(ONLINE_ROUNDS):
            if not (batch := self._next_unasked(asked)):
                break
            asked.update(batch)
            attempts = self._rollout.first_attempts([self._problems[i] for i in batch], step)
            failures += [attempt.failure for attempt in attempts if attempt.is_failure]
            if len(failures) >= self._count:
                return failures[: self._count]
        raise UserError(
            f"failures.source=online: {len(asked)} first answers gave {len(failures)} failures, "
            f"fewer than train.failures_per_step={self._count}; the policy solves this task already"
        )

    def _next_unasked(self, asked: Set[int]) -> list[int]:
        """The next `count` problems, by their index, that are not among those asked; fewer where fewer are left."""
        chosen: list[int] = []
        while len(chosen) < min(self._count, len(self._problems) - len(asked)):
            epoch, place = divmod(self.cursor, len(self._problems))
            problem = epoch_order(len(self._problems), self._seed, epoch)[place]
            self.cursor += 1
            if problem not in asked and problem not in chosen:
                chosen.append(problem)
        return chosen


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The seeded order in which an epoch visits `count` items."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
