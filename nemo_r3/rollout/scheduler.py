"""`Rollout`: attempts, reflections and retries through the engines, without a barrier between the phases.

    failure --G times--> reflection --the moment it ends--> retry --the moment it ends--> verifier --> Reflection
                         `---------------- one engine, one queue ---------------'

All ranks of one engine run the same loop over the same items and so make the same calls in the same order; nothing in
it may depend on time or rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from nemo_r3 import signals
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue
from nemo_r3.rollout.kept import Kept, turn_id
from nemo_r3.rollout.placement import Fleet
from nemo_r3.rollout.sampling import (
    UNFINISHED,
    Completion,
    Sampler,
    Sampling,
    is_deterministic,
    request_seed,
)
from nemo_r3.runtime import World
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import Answer, Failure, Group, Phase, Problem, Reflection, Segment, Trajectory

EngineT = TypeVar("EngineT", bound=Sampler)
NO_ROOM = "no_room"
"""Finish reason of a turn that was not sampled: its prompt fills rollout.max_model_len. Its answer is empty."""


class Progress(Protocol):
    """Told of finished turns, on rank 0 only."""

    def __call__(self, phase: str, done: int, total: int, tokens: int) -> None:
        """Of rank 0's engine: turns of `phase` that have ended, out of `total`, and tokens they sampled."""
        ...


@dataclass(frozen=True, slots=True)
class Attempted:
    """A first answer and its verdict.

    Attributes:
        problem: what was asked.
        sample: which of the samples drawn for this problem it is.
        context: [task][attempt].
        answer: the attempt; its finish_reason is "no_room" where the task alone fills the model's length.
        passed: whether the verifier accepts it.
    """

    problem: Problem
    sample: int
    context: Trajectory
    answer: Answer
    passed: bool

    @property
    def is_failure(self) -> bool:
        """Whether the verifier rejected it and it has tokens to reflect on."""
        return not self.passed and bool(self.answer.segment.ids)

    @property
    def failure(self) -> Failure:
        """This attempt as something to reflect on, where `is_failure`."""
        assert self.is_failure, "only a sampled, rejected attempt is a failure"
        return Failure(self.problem, self.context, self.answer, self.sample)


@dataclass(frozen=True)
class _Turn:
    """A turn to be sampled, and what to do when it has ended: perhaps another turn.

    Attributes:
        prompt: what comes before it; None where there is nothing to continue.
        key: identifies the problem in the request's seed.
    """

    phase: Phase
    prompt: Trajectory | None
    key: str
    sample: int
    then: Callable[[Answer], _Turn | None]


@dataclass
class _UnderWay:
    """The turns of one call that the engine is asked for, and counts of those that have ended.

    Attributes:
        asked: by request id, which is the turn's `turn_id`: the turn, and what an earlier process sampled of it.
        ended: turns by phase.
        tokens: that they sampled.
    """

    step: int
    greedy: bool
    asked: dict[str, tuple[_Turn, Completion | None]] = field(default_factory=dict)
    ended: Counter[Phase] = field(default_factory=Counter)
    tokens: Counter[Phase] = field(default_factory=Counter)

    def end(self, turn: _Turn, answer: Answer) -> _Turn | None:
        """Counts a turn that has ended; the one that follows from it."""
        self.ended[turn.phase] += 1
        self.tokens[turn.phase] += len(answer.segment.ids)
        return turn.then(answer)


class Rollout(Generic[EngineT]):
    """Samples turns with the run's engines; every rank calls the same method with the same arguments.

    Attributes:
        engine: this rank's.
        too_long: ids of the problems whose task alone fills `rollout.max_model_len`, so that they were not asked.
        kept: what this rank's engine has sampled in the step under way; nothing where rollouts are deterministic, since
            a step that is done again gives the same.
    """

    def __init__(
        self,
        engine: EngineT,
        dialogue: Dialogue,
        task: Task,
        config: Config,
        world: World,
        progress: Progress | None = None,
    ) -> None:
        """Takes this rank's engine.

        Args:
            engine: of this rank.
            dialogue: makes the prompts.
            task: whose verifier judges.
            config: the run's settings.
            world: all ranks.
            progress: told how far this rank's engine is.
        """
        self.engine = engine
        self._dialogue = dialogue
        self._task = task
        self._config = config
        self._fleet = Fleet(world, config.rollout.tensor_parallel)
        self._progress = progress if world.is_main else None
        self._deterministic = is_deterministic(config.rollout, torch.cuda.is_available())
        self.too_long: set[str] = set()
        self.kept = Kept(enabled=not self._deterministic)

    def first_attempts(
        self, problems: Sequence[Problem], step: int, samples: int = 1, greedy: bool = False
    ) -> list[Attempted]:
        """First answers and their verdicts, on every rank.

        Args:
            problems: what to ask.
            step: part of every request's seed.
            samples: answers per problem.
            greedy: take the likeliest token instead of sampling.

        Raises:
            Stopped: a signal asked to stop.

        Returns:
            len(problems) * samples attempts: all of the first problem's, then the next one's.
        """
        prompts = [self._dialogue.task(problem) for problem in problems]
        mine = self._fleet.mine([len(prompt) * samples for prompt in prompts])
        done: dict[int, Attempted] = {}

        def attempt(item: int, sample: int) -> _Turn:
            problem = problems[item]

            def end(answer: Answer) -> None:
                context = prompts[item].then(answer.segment)
                passed = self._verify(problem, answer)
                done[item * samples + sample] = Attempted(problem, sample, context, answer, passed)

            return _Turn(Phase.ATTEMPT, prompts[item], problem.id, sample, end)

        turns = [attempt(item, sample) for item in mine for sample in range(samples)]
        self._run(turns, step, greedy, {Phase.ATTEMPT: len(turns)})
        attempts = self._fleet.collect(done, len(problems) * samples)
        self.too_long |= {it.problem.id for it in attempts if it.answer.finish_reason == NO_ROOM}
        return attempts

    def reflect_and_retry(
        self, failures: Sequence[Failure], step: int, group_size: int, greedy: bool = False
    ) -> list[Group]:
        """A group of reflections per failure, each with its retry and reward, on every rank, in the failures' order.

        A reflection that was cut at its token limit is closed by the template before the retry. A turn whose prompt
        leaves no room in `rollout.max_model_len` is not sampled: its answer is empty with finish reason "no_room", and
        the reward is 0.

        Args:
            failures: what to reflect on.
            step: part of every request's seed.
            group_size: reflections per failure.
            greedy: take the likeliest token instead of sampling.

        Raises:
            Stopped: a signal asked to stop.
        """
        prompts = [self._dialogue.reflect(failure.context) for failure in failures]
        mine = self._fleet.mine([len(prompt) * group_size for prompt in prompts])
        found: dict[int, dict[int, Reflection]] = {item: {} for item in mine}

        def reflect(item: int, sample: int) -> _Turn:
            failure, prompt = failures[item], prompts[item]

            def end(reflection: Answer) -> _Turn:
                trajectory = prompt.then(reflection.segment)
                solves = self._verify(failure.problem, reflection)
                retried = self._dialogue.retry(trajectory) if reflection.segment.ids else None

                def finish(retry: Answer) -> None:
                    reward = float(self._verify(failure.problem, retry))
                    whole = trajectory if retried is None else retried.then(retry.segment)
                    found[item][sample] = Reflection(sample, whole, reflection, retry, reward, solves)

                return _Turn(Phase.RETRY, retried, failure.id, sample, finish)

            return _Turn(Phase.REFLECTION, prompt, failure.id, sample, end)

        turns = [reflect(item, sample) for item in mine for sample in range(group_size)]
        self._run(turns, step, greedy, {Phase.REFLECTION: len(turns), Phase.RETRY: len(turns)})
        done = {
            item: Group(failures[item], tuple(by_sample[sample] for sample in range(group_size)))
            for item, by_sample in found.items()
            if len(by_sample) == group_size
        }
        return self._fleet.collect(done, len(failures))

    def _run(self, turns: Sequence[_Turn], step: int, greedy: bool, totals: dict[Phase, int]) -> None:
        """Samples turns and those that follow from them until none is left, or a signal asks to stop."""
        under_way = _UnderWay(step, greedy)
        self.kept.begin(step)
        if self._deterministic:
            self.engine.forget()  # what is cached must not depend on what came before, a resumed run has less of it
        for turn in turns:
            self._ask(turn, under_way)
        while under_way.asked and not self._fleet.asked_to_stop():
            signals.alive()
            completions = self.engine.step()
            for completion in completions:
                turn, whole = self._take(completion, under_way)
                self._ask(under_way.end(turn, self._answer(turn.phase, whole)), under_way)
            if completions and self._progress is not None:
                for phase, total in totals.items():
                    self._progress(phase, under_way.ended[phase], total, under_way.tokens[phase])
        for completion in self.engine.leave():
            self._take(completion, under_way)

    def _ask(self, turn: _Turn | None, under_way: _UnderWay) -> None:
        """Adds a turn to the engine; where its answer is known without sampling, the turn that follows from it."""
        while turn is not None:
            prompt = turn.prompt
            room = 0 if prompt is None else self.engine.max_model_len - len(prompt)
            if prompt is None or room < 1:
                turn = under_way.end(turn, self._unsampled(turn.phase))
                continue
            name = turn_id(turn.phase, prompt, turn.key, turn.sample)
            begun = self.kept.find(name)
            if begun is not None and begun.finish_reason != UNFINISHED:
                turn = under_way.end(turn, self._answer(turn.phase, begun))
                continue
            ids = begun.ids if begun is not None else ()
            assert name not in under_way.asked, "one sample of a prompt is asked for twice"
            under_way.asked[name] = turn, begun
            sampling = self._sampling(turn, under_way.step, under_way.greedy, room, len(ids))
            self.engine.add(name, [*prompt.ids, *ids], sampling)
            return

    def _take(self, completion: Completion, under_way: _UnderWay) -> tuple[_Turn, Completion]:
        """The turn of a completion and all that has been sampled of it, which is kept."""
        turn, begun = under_way.asked.pop(completion.request_id)
        whole = completion.continuing(begun)
        self.kept.add(completion.request_id, whole)
        return turn, whole

    def _sampling(self, turn: _Turn, step: int, greedy: bool, room: int, begun: int) -> Sampling:
        rollout = self._config.rollout
        limit = rollout.max_reflection_tokens if turn.phase is Phase.REFLECTION else rollout.max_answer_tokens
        # a turn that continues must not draw the random numbers of its beginning again
        phase = f"{turn.phase}+{begun}" if begun else turn.phase
        seed = request_seed(self._config.seed, step, turn.key, turn.sample, phase)
        return Sampling(
            temperature=0.0 if greedy else rollout.temperature,
            max_tokens=min(limit, room) - begun,
            stop_ids=self._dialogue.end_of_turn,
            seed=None if greedy else seed,
        )

    def _answer(self, phase: Phase, completion: Completion) -> Answer:
        segment = Segment(phase, completion.ids, completion.logprobs, completion.version)
        return Answer(segment, self._dialogue.decode(completion.ids), completion.finish_reason)

    def _unsampled(self, phase: Phase) -> Answer:
        return Answer(Segment(phase, (), (), self.engine.version), "", NO_ROOM)

    def _verify(self, problem: Problem, answer: Answer) -> bool:
        return answer.finish_reason != NO_ROOM and self._task.verify(problem, answer.text)
