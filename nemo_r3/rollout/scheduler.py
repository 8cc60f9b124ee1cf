"""`Rollout`: samples attempts, reflections and retries, without a barrier between the phases.

    failure --G times--> reflection --as soon as it ends--> retry --as soon as it ends--> verifier --> Reflection
                         `---------------- one engine, one queue ---------------'

Each is a conversation: a generator that yields the turns to be sampled and is sent their answers. All ranks of an
engine run this loop over the same conversations and must make the same calls in the same order, so nothing here but
what is shown may depend on time or rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from nemo_r3 import signals, watchdog
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue
from nemo_r3.errors import VerifierError
from nemo_r3.progress import Progress, Turns
from nemo_r3.rollout.judge import Judge
from nemo_r3.rollout.placement import Fleet
from nemo_r3.rollout.sampling import UNFINISHED, Completion, Sampling, is_deterministic, request_seed
from nemo_r3.rollout.turn_cache import TurnCache, turn_id
from nemo_r3.runtime import World
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import NO_ROOM, Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory

if TYPE_CHECKING:
    from nemo_r3.rollout.engine import Engine  # vLLM

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Turn:
    """A turn to be sampled."""

    phase: Phase
    prompt: Trajectory | None  # what comes before it; None if there is nothing to continue
    key: str  # identifies the problem or failure in the request's seed
    sample: int  # its index among the samples of that
    known: int = 0  # how many of the prompt's tokens have their experts from another turn


Conversation = Generator[_Turn, Answer, Callable[[], Result]]
"""Yields each turn to be sampled, is sent the answer, and returns what makes the result once its verdicts are there."""


@dataclass
class _InFlight(Generic[Result]):
    """The conversations of one call."""

    conversations: Mapping[int, Conversation[Result]]  # by the numbers of their results
    step: int  # part of every request's seed
    greedy: bool  # take the likeliest token instead of sampling
    requests: dict[str, tuple[int, _Turn, Completion | None]] = field(default_factory=dict)
    """What the engine works on, by `turn_id`: the conversation's number, its turn, and what an earlier process sampled
    of that."""
    done: dict[int, Callable[[], Result]] = field(default_factory=dict)  # what those that have ended returned
    ended: Counter[Phase] = field(default_factory=Counter)  # turns by phase
    tokens: Counter[Phase] = field(default_factory=Counter)  # sampled by requests that have ended

    def next_turn(self, number: int, answer: Answer | None) -> _Turn | None:
        """A conversation's turn after the one with this answer, or without one its first; None if it has ended."""
        try:
            if answer is None:
                return next(self.conversations[number])
            self.ended[answer.segment.phase] += 1
            return self.conversations[number].send(answer)
        except StopIteration as end:
            self.done[number] = end.value
            return None


class Rollout:
    """Samples turns with the run's engines; every rank calls the same method with the same arguments.

    A method's `step` is part of every request's seed; with `greedy` it takes the likeliest token instead of sampling.
    Each raises `Stopped` if a signal asked for that, and VerifierError if the verifier failed on an answer.

    Attributes:
        engine: this rank's.
        too_long: ids of the problems that were not asked, because the task alone fills `rollout.max_model_len`.
        turns: what this rank's engine has sampled in the current step; empty if rollouts are deterministic, because
            then a repeated step gives the same.
        judge: asks the task's verifier; its seconds are those of the last call.
    """

    def __init__(
        self, engine: Engine, dialogue: Dialogue, task: Task, config: Config, world: World, progress: Progress
    ) -> None:
        self.engine = engine
        self._dialogue = dialogue
        self._config = config
        self._world, self._fleet = world, Fleet(world, config.rollout.tensor_parallel)
        self._progress = progress
        self._deterministic = is_deterministic(config.rollout, torch.cuda.is_available())
        self.too_long: set[str] = set()
        self.turns = TurnCache(enabled=not self._deterministic)
        self.judge = Judge(task, config.task.verifier_threads)

    def first_attempts(
        self,
        problems: Sequence[Problem],
        step: int,
        samples: int = 1,
        greedy: bool = False,
        everywhere: bool = True,
    ) -> list[Attempt]:
        """First answers and their verdicts: the first problem's `samples`, then the next one's.

        On every rank; without `everywhere` on rank 0, and elsewhere none.
        """

        @cache
        def prompt_of(item: int) -> Trajectory:
            return self._dialogue.task(problems[item])

        def attempt(item: int, sample: int, wanted: bool) -> Conversation[Attempt]:
            problem, prompt = problems[item], prompt_of(item)
            answer = yield _Turn(Phase.ATTEMPT, prompt, problem.id, sample)
            context, passed = prompt.then(answer.segment), self.judge.ask(problem, answer, wanted)
            return lambda: Attempt(problem, sample, context, answer, self.judge.verdict(passed))

        # dealt by their text: to tokenise other engines' prompts, with all their tools, can take minutes
        costs = [len(problem.text) for problem in problems]
        attempts = self._hold(attempt, costs, samples, step, greedy, [Phase.ATTEMPT], everywhere)
        self.too_long |= {attempt.problem.id for attempt in attempts if attempt.answer.finish_reason == NO_ROOM}
        return attempts

    def reflect_and_retry(
        self, failures: Sequence[Attempt], step: int, group_size: int, greedy: bool = False
    ) -> list[Group]:
        """A group of reflections per failure, each with its retry and reward, on every rank, in the failures' order.

        The template closes a reflection that was cut at its token limit before the retry. A turn whose prompt leaves no
        room in `rollout.max_model_len` is not sampled: its answer is empty, with finish reason NO_ROOM, and fails.
        """
        reflections = iter(self._reflections(failures, None, step, group_size, greedy))
        return [Group(failure, tuple(islice(reflections, group_size))) for failure in failures]

    def retry_after(self, failures: Sequence[Attempt], reflections: Sequence[Answer], step: int) -> list[Reflection]:
        """A retry on each failure after the reflection given for it, in the failures' order, on every rank.

        The reflections' token ids are taken as they are. They are not verified, so `solves` is False.
        """
        return self._reflections(failures, reflections, step, group_size=1, greedy=False)

    def _reflections(
        self,
        failures: Sequence[Attempt],
        given: Sequence[Answer] | None,
        step: int,
        group_size: int,
        greedy: bool,
    ) -> list[Reflection]:
        """`group_size` reflections on each failure, or the one that is given for it, with their retries."""
        prompts = [self._dialogue.reflect(failure.context, failure.problem) for failure in failures]

        def reflect(item: int, sample: int, wanted: bool) -> Conversation[Reflection]:
            failure, prompt = failures[item], prompts[item]
            if given is None:
                # a group's first reflection brings the context's experts
                reflection = yield _Turn(Phase.REFLECTION, prompt, failure.id, sample, len(prompt) if sample else 0)
            else:
                reflection = given[item]
            solves = self.judge.ask(failure.problem, reflection, wanted and given is None)
            whole = prompt.then(reflection.segment)
            retry_prompt = self._dialogue.retry(whole, failure.problem) if reflection.segment.ids else None
            # of the tokens so far, the reflection's last was sent to no experts yet
            retry = yield _Turn(Phase.RETRY, retry_prompt, failure.id, sample, len(whole) - 1)
            passed, verdict = self.judge.ask(failure.problem, retry, wanted), self.judge.verdict
            if retry_prompt is not None:
                whole = retry_prompt.then(retry.segment)
            return lambda: Reflection(sample, whole, reflection, retry, verdict(passed), verdict(solves))

        phases = [Phase.REFLECTION, Phase.RETRY] if given is None else [Phase.RETRY]
        costs = [len(prompt) * group_size for prompt in prompts]
        return self._hold(reflect, costs, group_size, step, greedy, phases)

    def _hold(
        self,
        converse: Callable[[int, int, bool], Conversation[Result]],
        costs: Sequence[int],
        samples: int,
        step: int,
        greedy: bool,
        phases: Sequence[Phase],
        everywhere: bool = True,
    ) -> list[Result]:
        """Deals items to the engines, holds their conversations, and collects the results of all: `everywhere`, or on
        rank 0 alone.

        `converse` begins the conversation of an item and one of its `samples`; its last argument is whether this rank
        judges the answers. The results are in the order of the items, and of an item's samples.
        """
        numbers, share = self._fleet.deal(costs, samples)
        conversations = {number: converse(*divmod(number, samples), number in share) for number in numbers}
        done = self._run(conversations, step, greedy, phases)
        own = {number: done[number]() for number in done if number in share and signals.noted() is None}
        self._world.leave_if_asked()  # first: a Ctrl-C may also have ended a program that the verifier waited for
        if failures := [failure for failure in self._world.gather(self.judge.failure) if failure is not None]:
            raise VerifierError(str(failures[0]))
        merged = self._world.merge(own) if everywhere else self._world.merge_on_main(own)
        if everywhere or self._world.is_main:
            assert len(merged) == len(costs) * samples, "an engine lost some of its work"
        return [merged[number] for number in range(len(merged))]

    def _run(
        self, conversations: Mapping[int, Conversation[Result]], step: int, greedy: bool, phases: Sequence[Phase]
    ) -> dict[int, Callable[[], Result]]:
        """Samples the turns of conversations, one of each phase, until all have ended or the engine has to stop.

        Returns:
            What the conversations that have ended returned, by their numbers.
        """
        in_flight = _InFlight(conversations, step, greedy)
        self.judge.seconds = 0.0
        self.turns.begin(step)
        if self._deterministic:  # a resumed run has less in its cache: what an engine computes must not depend on it
            self.engine.reset_prefix_cache()
        for number in conversations:
            self._go_on(number, None, in_flight)
        self._report(in_flight, phases)
        while in_flight.requests and not self._fleet.asked_to_stop(self.judge.failure is not None):
            watchdog.alive()
            for completion in self.engine.step():
                number, turn, whole = self._take(completion, in_flight)
                self._go_on(number, self._answer(turn.phase, whole), in_flight)
            if self._progress.is_due():
                self._report(in_flight, phases)
        self._report(in_flight, phases)
        for completion in self.engine.abort():
            self._take(completion, in_flight)
        # outside of training there is nothing to save, so the other engines need not be waited for
        if self.judge.failure is not None and self.turns.step < 1 and signals.noted() is None:
            raise VerifierError(str(self.judge.failure))
        return in_flight.done

    def _go_on(self, number: int, answer: Answer | None, in_flight: _InFlight[Any]) -> None:
        """Gives a conversation its last turn's answer; adds the next turn that has to be sampled to the engine."""
        while (turn := in_flight.next_turn(number, answer)) is not None:
            prompt = turn.prompt
            room = 0 if prompt is None else self.engine.max_model_len - len(prompt)
            if prompt is None or room < 1:
                answer = Answer(Segment(turn.phase, (), (), self.engine.version), "", NO_ROOM)
                continue
            name = turn_id(turn.phase, prompt, turn.key, turn.sample)
            begun = self.turns.get(name)
            if begun is not None and begun.finish_reason != UNFINISHED:
                answer = self._answer(turn.phase, begun)
                continue
            ids = () if begun is None else begun.ids
            assert name not in in_flight.requests, "one sample of a prompt is requested twice"
            in_flight.requests[name] = number, turn, begun
            self.engine.add(name, [*prompt.ids, *ids], self._sampling(turn, in_flight, room, len(ids)))
            return

    def _take(self, completion: Completion, in_flight: _InFlight[Any]) -> tuple[int, _Turn, Completion]:
        """The conversation and turn of a completion, and all that has been sampled of the turn, which is cached."""
        number, turn, begun = in_flight.requests.pop(completion.request_id)
        in_flight.tokens[turn.phase] += len(completion.ids)
        whole = completion.continuing(begun)
        self.turns.add(completion.request_id, whole)
        return number, turn, whole

    def _report(self, in_flight: _InFlight[Any], phases: Sequence[Phase]) -> None:
        """Shows how far the conversations are; a turn under way counts as the share of its token limit that it has."""
        tokens, begun = in_flight.tokens.copy(), dict.fromkeys(phases, 0.0)
        for name, count in self.engine.unfinished().items():
            phase = in_flight.requests[name][1].phase
            tokens[phase] += count
            begun[phase] += count / self._config.rollout.token_limit(phase)
        total = len(in_flight.conversations)
        self._progress({it: Turns(in_flight.ended[it], total, tokens[it], begun[it]) for it in phases})

    def _sampling(self, turn: _Turn, in_flight: _InFlight[Any], room: int, begun: int) -> Sampling:
        """How to sample a turn with `room` tokens left, `begun` of which it already has."""
        rollout = self._config.rollout
        # a continued turn must not draw the random numbers of its beginning again
        phase = f"{turn.phase}+{begun}" if begun else turn.phase
        seed = request_seed(self._config.seed, in_flight.step, turn.key, turn.sample, phase)
        return Sampling(
            temperature=0.0 if in_flight.greedy else rollout.temperature,
            max_tokens=min(rollout.token_limit(turn.phase), room) - begun,
            stop_ids=self._dialogue.end_of_turn,
            seed=None if in_flight.greedy else seed,
            experts_from=self._experts_from(turn, in_flight.step, begun),
        )

    def _experts_from(self, turn: _Turn, step: int, begun: int) -> int | None:
        """The first token whose experts are wanted, of a turn that already has `begun`; None: of no token.

        Wanted are those of all that a training step's rows have: of reflections, and of retries that are trained.
        """
        in_rows = {Phase.REFLECTION, *self._config.algo.trained_phases}
        if not self._config.actor.routing_replay or step < 1 or turn.phase not in in_rows or turn.prompt is None:
            return None
        return len(turn.prompt) + begun - 1 if begun else turn.known

    def _answer(self, phase: Phase, completion: Completion) -> Answer:
        segment = Segment(phase, completion.ids, completion.logprobs, completion.version, completion.routed_experts)
        return Answer(segment, self._dialogue.decode(completion.ids), completion.finish_reason)
