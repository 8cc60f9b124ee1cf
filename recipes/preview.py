"""Shows whole dialogues, to see before mining whether prompts, chat template and verifier work.

Samples first answers to training problems, and a reflection and a retry for each failure. Nothing is kept. A number
after CONFIG.yaml says how many dialogues to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from nemo_r3 import entry
from nemo_r3.dialogue import Dialogue
from nemo_r3.failures.bank import MINING_STEP
from nemo_r3.failures.tally import tally
from nemo_r3.progress import warn
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import NO_ROOM, Answer, Attempt, Group, Phase, Trajectory
from recipes.metrics import warn_of_long_problems
from recipes.setup import join
from recipes.start import start_rollout

SHOWN = 3
ASKED_PER_SHOWN = 8
"""So many problems are asked for each dialogue shown: a model may solve most of them, and failures are shown first."""


def preview(argv: Sequence[str]) -> None:
    """`python -m recipes.preview CONFIG.yaml [how many] key=value ...`."""
    shown = next((int(word) for word in argv if word.isdecimal()), SHOWN)
    setup = join([word for word in argv if not word.isdecimal()], trains=False)
    rollout = start_rollout(setup)
    problems = setup.task.problems("train")[: shown * ASKED_PER_SHOWN]
    setup.progress.begin("preview")
    attempts = sorted(rollout.first_attempts(problems, MINING_STEP), key=lambda attempt: not attempt.is_failure)
    failures = [attempt for attempt in attempts[:shown] if attempt.is_failure]
    groups = rollout.reflect_and_retry(failures, MINING_STEP, group_size=1)
    warn_of_long_problems(setup, rollout)
    for attempt, group in zip_longest(attempts[:shown], groups):  # failures come first
        setup.progress.say(f"\n=== problem {attempt.problem.id} {attempt.problem.data}")
        whole, notes = attempt.context, {Phase.ATTEMPT: verdict(attempt.answer, attempt.passed)}
        if group is not None:
            (it,) = group.reflections
            whole, notes[Phase.RETRY] = it.trajectory, verdict(it.retry, it.passed)
            if reason := unfinished(it.answer, "max_reflection_tokens"):
                notes[Phase.REFLECTION] = f"--- {reason}"
        setup.progress.say(written(setup.dialogue, whole, notes))
    counts = tally(attempts)
    setup.progress.say(f"\n{counts.line(len(problems))}\n{counts.doubt()}".rstrip())
    warn_of_other_verdicts(setup.task, attempts, groups)


def warn_of_other_verdicts(task: Task, attempts: Sequence[Attempt], groups: Sequence[Group]) -> None:
    """Verifies everything a second time; warns of a verifier that changes its mind, since banks keep its verdicts."""
    judged = [(it.problem, it.answer, it.passed) for it in attempts]
    judged += [(group.failure.problem, it.retry, it.passed) for group in groups for it in group.reflections]
    asked = [(problem, answer.text, passed) for problem, answer, passed in judged if answer.finish_reason != NO_ROOM]
    if other := [problem.id for problem, text, passed in asked if task.verify(problem, text) != passed]:
        warn(
            f"{task.name}.verify gave {len(other)} of {len(asked)} answers another verdict when it was asked again, "
            f"such as one to problem {other[0]!r}: the same answer must always get the same verdict"
        )


def verdict(answer: Answer, passed: bool) -> str:
    """The line after an attempt or a retry; it says whether the model could not finish."""
    reason = unfinished(answer, "max_answer_tokens")
    return f"--- verdict: {'passed' if passed else 'failed'}{f' ({reason})' if reason else ''}"


def unfinished(answer: Answer, limit: str) -> str:
    """Why there is no whole answer; empty if there is one."""
    reasons = {"length": f"cut at rollout.{limit}", NO_ROOM: "not asked: no room in rollout.max_model_len"}
    return reasons.get(answer.finish_reason, "")


def written(dialogue: Dialogue, trajectory: Trajectory, notes: Mapping[Phase, str]) -> str:
    """A dialogue as text, with its special tokens; the note on a phase comes after it."""
    parts = []
    for segment in trajectory.segments:
        parts.append(f"--- {segment.phase}\n{dialogue.whole(segment.ids)}")
        if segment.phase in notes:
            parts.append(notes[segment.phase])
    return "\n".join(parts)


if __name__ == "__main__":
    entry.main(preview)
