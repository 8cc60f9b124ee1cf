"""`Bank`: failed first attempts on disk, mined once from the starting model, as in the paper.

failures/bank.json          what mined it: model, task, verifier, dialogue, sampling; the shards' SHA-256 and its own
failures/shard_00000.jsonl  the rejected answers to a fixed slice of the problems, written whole: mining resumes
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.failures.stamp import Stamp, differences
from nemo_r3.failures.tally import Tally, tally, total
from nemo_r3.files import sealed, sum_of, take_lock, unsealed, write_whole
from nemo_r3.progress import Progress, warn
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.runtime import World
from nemo_r3.types import Answer, Attempt, Phase, Problem, Segment, Trajectory

SHARD_PROBLEMS = 512
MINING_STEP = 0
MINED_BATCHES = 4
"""Full batches that each engine is given at once: near their end it runs half empty, until the longest answers end."""
COMPARED_ROWS = 8
"""How many answers of a foreign bank are decoded and compared with their text."""


class BankRow(NamedTuple):
    """Where a failure is in a bank: all failures of a large bank would fill the memory."""

    shard: Path
    offset: int

    def load(self) -> Attempt:
        """The failure.

        Raises:
            UserError: it is no longer there.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                return failure_of(json.loads(file.readline()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"failures.path: {self.shard} was changed while this run used it ({error!r})") from error


class Bank:
    """A directory of mined failures. Only rank 0 touches it: on a shared file system, ranks may see different files.

    All ranks open it, and call its methods, together.

    Args:
        config: the run's settings.
        stamp: what its answers depend on.
        world: all ranks.
        decode: gives the text of an answer's ids, see `Dialogue.decode`.

    Raises:
        UserError: it was mined with another model, task, verifier, dialogue or sampling; or it is accepted as foreign
            but holds token ids of another tokenizer.

    Attributes:
        example: the first answer that this process mined, if any, on rank 0.
    """

    def __init__(self, config: Config, stamp: Stamp, world: World, decode: Callable[[Sequence[int]], str]) -> None:
        self.path = Path(config.failures.path)
        self.example: Attempt | None = None
        self._config, self._stamp, self._world, self._decode = config, stamp, world, decode
        self._index = self.path / "bank.json"
        self._shards: dict[str, str] = {}
        self._tallies: dict[str, dict[str, int]] = {}
        self.is_complete()

    def is_complete(self) -> bool:
        """Whether nothing is left to mine now, when another run may have mined it since.

        A bank that is missing, half mined or lacking a shard is not complete.

        Raises:
            UserError: as when it is opened.
        """
        return self._world.on_main(self._is_complete)

    def _is_complete(self) -> bool:
        if not self._index.exists():
            if any(self.path.glob("shard_*.jsonl")):
                raise UserError(f"failures.path: {self.path} has shards but no bank.json to say whose; remove them")
            return False
        index = self._read_index()
        differing = differences(index["stamp"], vars(self._stamp))
        lost = [name for name in index["shards"] if not (self.path / name).exists()]
        complete = bool(index["complete"]) and not lost
        if differing and not (self._config.failures.allow_foreign and complete):
            raise UserError(
                f"failures.path: {self.path} was mined otherwise: {', '.join(differing)}; mine a new bank at another "
                "failures.path, or accept this one, if it is complete, with failures.allow_foreign=true"
                + "".join(f"; {name} is missing" for name in lost)
            )
        if differing:
            self._refuse_other_tokens()
        return complete

    def _refuse_other_tokens(self) -> None:
        for row in islice(self._find_rows(), COMPARED_ROWS):
            answer = row.load().answer
            if (read := self._decode(answer.segment.ids)) != answer.text:
                raise UserError(
                    f"failures.path: {self.path} holds token ids of another tokenizer: {row.shard} has an answer "
                    f"{answer.text[:40]!r} that this tokenizer reads as {read[:40]!r}; failures.allow_foreign=true "
                    "cannot change that, so mine a new bank at another failures.path"
                )

    def mine(self, rollout: Rollout, problems: Sequence[Problem], progress: Progress | None = None) -> None:
        """Samples first answers to the problems and keeps every one that the verifier rejects.

        Shards are mined in batches that keep all engines busy; a process that dies loses only the current batch.
        """
        samples = self._config.failures.samples_per_problem
        starts = range(0, len(problems), SHARD_PROBLEMS)
        parts = {f"shard_{i:05d}.jsonl": problems[start : start + SHARD_PROBLEMS] for i, start in enumerate(starts)}
        if self._world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            take_lock(self.path)
            self._read_mined()
            self._write_index(len(problems), complete=False)
        missing = self._world.broadcast([name for name in parts if name not in self._shards])
        at_once = self._shards_at_once()
        for first in range(0, len(missing), at_once):
            names = missing[first : first + at_once]
            asked = [problem for name in names for problem in parts[name]]
            if progress is not None:
                done = len(problems) - sum(len(parts[name]) for name in missing[first:])
                progress.part(done, len(asked), len(problems))
            attempts = rollout.first_attempts(asked, MINING_STEP, samples, everywhere=False)
            if self._world.is_main:
                self.example = self.example or attempts[0]
                left = iter(attempts)
                for name in names:
                    self._keep(name, list(islice(left, len(parts[name]) * samples)))
                    self._write_index(len(problems), complete=False)
        if self._world.is_main:
            self._write_index(len(problems), complete=True)
        self._world.barrier()

    def _keep(self, name: str, attempts: Sequence[Attempt]) -> None:
        """Writes a shard."""
        rows = _rows(attempts, self._config.failures.samples_per_problem)
        write_whole(self.path / name, "".join(f"{json.dumps(row)}\n" for row in rows))
        self._shards[name], self._tallies[name] = sum_of(self.path / name), vars(tally(attempts))

    def _shards_at_once(self) -> int:
        """The fewest shards that give every engine MINED_BATCHES times `rollout.max_num_seqs` prompts."""
        rollout = self._config.rollout
        prompts = MINED_BATCHES * (self._world.size // rollout.tensor_parallel) * rollout.max_num_seqs
        return math.ceil(prompts / (SHARD_PROBLEMS * self._config.failures.samples_per_problem))

    def read(self) -> list[BankRow]:
        """All failures of problems solved as often as `failures` asks, in the problems' order, on every rank.

        Raises:
            UserError: there are none, or a shard is damaged.
        """
        rows = self._world.on_main(lambda: list(self._find_rows()))
        if not rows:
            raise UserError(
                f"failures.path: the bank {self.path} holds no failures, so there is nothing to reflect on: "
                + self.tally().why_no_failures(self._config)
            )
        return rows

    def tally(self) -> Tally:
        """How all first answers of the bank fared, on every rank."""
        return self._world.on_main(lambda: total(self._read_index()["tallies"].values()))

    def _find_rows(self) -> Iterator[BankRow]:
        for name, mined in sorted(self._read_index()["shards"].items()):
            shard, offset = self.path / name, 0
            if sum_of(shard) != mined:
                raise UserError(
                    f"failures.path: {shard} was lost, cut or changed since it was mined; remove this file, and "
                    "recipes.mine asks its problems again"
                )
            with shard.open("rb") as file:
                for line in file:
                    if self._lets_through(line):
                        yield BankRow(shard, offset)
                    offset += len(line)

    def _lets_through(self, line: bytes) -> bool:
        least, most = self._config.failures.min_solve_rate, self._config.failures.max_solve_rate
        return (least, most) == (0.0, 1.0) or least <= json.loads(line)["solve_rate"] <= most

    def _read_mined(self) -> None:
        """Takes over the shards that earlier processes mined."""
        if not self._index.exists():
            return
        index = self._read_index()
        self._shards, self._tallies = index["shards"], index["tallies"]
        for name in [name for name in self._shards if not (self.path / name).exists()]:
            warn(f"{self.path / name} is missing; its problems are asked again")
            del self._shards[name]

    def _read_index(self) -> dict[str, Any]:
        try:
            index = unsealed(self._index.read_text())
            return {name: index[name] for name in ("stamp", "complete", "shards", "tallies")}
        except (ValueError, KeyError) as error:
            raise UserError(f"failures.path: {self._index} is damaged ({error}); remove {self.path}") from error

    def _write_index(self, problems: int, complete: bool) -> None:
        kept = {"shards": self._shards, "tallies": self._tallies}
        index = {"stamp": vars(self._stamp), "complete": complete, "problems": problems, **kept}
        write_whole(self._index, sealed(index))


def _rows(attempts: Sequence[Attempt], samples: int) -> list[dict[str, Any]]:
    """The bank's rows, one for each failure among the attempts."""
    rows = []
    for first in range(0, len(attempts), samples):
        answers = attempts[first : first + samples]
        solve_rate = sum(attempt.passed for attempt in answers) / samples
        rows += [row_of(attempt, solve_rate) for attempt in answers if attempt.is_failure]
    return rows


def row_of(failure: Attempt, solve_rate: float) -> dict[str, Any]:
    """A failure as JSON; `solve_rate` is the share of the answers to its problem that passed."""
    answer = failure.answer
    return {
        "problem_id": failure.problem.id,
        "problem": {
            "text": failure.problem.text,
            "data": failure.problem.data,
            "tools": failure.problem.tools,
        },
        "sample": failure.sample,
        "solve_rate": solve_rate,
        "task_ids": failure.context.segments[0].ids,
        "attempt": answer.text,
        "attempt_ids": answer.segment.ids,
        "attempt_logprobs": [round(value, 6) for value in answer.segment.logprobs],
        "finish_reason": answer.finish_reason,
        "weights_version": answer.segment.version,
    }


def failure_of(row: Mapping[str, Any]) -> Attempt:
    """The inverse of `row_of`."""
    asked = row["problem"]
    problem = Problem(row["problem_id"], asked["text"], asked["data"], tuple(asked["tools"]))
    task = Segment(Phase.TASK, tuple(row["task_ids"]))
    segment = Segment(Phase.ATTEMPT, tuple(row["attempt_ids"]), tuple(row["attempt_logprobs"]), row["weights_version"])
    answer = Answer(segment, row["attempt"], row["finish_reason"])
    return Attempt(problem, row["sample"], Trajectory((task, segment)), answer, passed=False)
