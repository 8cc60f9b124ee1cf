"""What a step's rollouts and its update say in metrics.jsonl and on the step's line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3.config import Config, RolloutConfig
from nemo_r3.models import flops
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory, UpdateBatch
from recipes.counters import Counters
from recipes.metrics import measures, speed, summary, warn_of_truncated_answers

PHASES = ("rollout", "update")
SAMPLED = {"reflection_tokens": 9.0, "truncated": 0.0, "retries_truncated": 0.0}
SAMPLED |= {"speed/rollout_tokens": 1.0, "speed/verifier_share": 0.0}
SAMPLED |= {"distinct_reflections": 2.0, "contradictions": 0.0}


def answer(phase: Phase, tokens: int, finish_reason: str = "stop") -> Answer:
    return Answer(Segment(phase, (1,) * tokens, (-1.0,) * tokens, 0), "", finish_reason)


def reflection(
    tokens: int, reason: str, retry_tokens: int, retry_reason: str, passed: float, solves: bool = False
) -> Reflection:
    answers = answer(Phase.REFLECTION, tokens, reason), answer(Phase.RETRY, retry_tokens, retry_reason)
    return Reflection(0, Trajectory(), *answers, passed > 0, solves)


def test_measures_are_means_over_the_reflections_of_all_groups() -> None:
    failure, cut = (
        Attempt(Problem("0", "", {}), 0, Trajectory(), answer(Phase.ATTEMPT, 9, reason), False)
        for reason in ("stop", "length")
    )
    first = reflection(10, "length", 3, "stop", 0.0), reflection(4, "stop", 5, "length", 1.0, solves=True)
    second = reflection(6, "stop", 7, "length", 0.0, solves=True), reflection(8, "stop", 0, "no_room", 0.0)
    batch = UpdateBatch(groups_used=1, groups_dropped=1, rewards=((0.0, 0.5), (0.0, 0.0)))
    assert measures([Group(failure, first), Group(cut, second)], batch) == {
        "groups_used": 1,
        "groups_dropped": 1,
        "reward": 0.125,
        "retry_success": 0.25,
        "reflection_tokens": 7.0,
        "retry_tokens": 3.75,
        "reflection_solves": 0.5,
        "truncated": 0.25,
        "retries_truncated": 0.5,
        "attempts_truncated": 0.5,
        "distinct_reflections": 1.0,
        "contradictions": 2,
    }


@pytest.mark.parametrize(
    ("texts", "contradictory"),
    [
        ({}, 0),
        ({"first": "b"}, 1),  # what was rejected passes as a retry
        ({"reflections": ("r", "b")}, 1),  # a reflection that is rejected passes as a retry
        ({"retries": ("b", "b")}, 1),
        ({"retries": ("b", "b"), "reason": "no_room"}, 0),  # never judged
    ],
)
def test_a_verifier_that_contradicts_itself_is_noticed(texts: dict[str, Any], contradictory: int) -> None:
    def say(text: str, reason: str = "stop") -> Answer:
        return Answer(Segment(Phase.RETRY, (1,), (-1.0,), 0), text, reason)

    failure = Attempt(Problem("0", "", {}), 0, Trajectory(), say(texts.get("first", "a")), False)
    turns = zip(texts.get("reflections", ("r", "s")), texts.get("retries", ("a", "b")), strict=True)
    reflections = tuple(
        Reflection(n, Trajectory(), say(reflected), say(retried, "stop" if n else texts.get("reason", "stop")), bool(n))
        for n, (reflected, retried) in enumerate(turns)
    )
    batch = UpdateBatch(rewards=((0.0, 1.0),))
    assert measures([Group(failure, reflections)], batch)["contradictions"] == contradictory
    assert measures([Group(failure, reflections)], batch)["distinct_reflections"] == 2


def test_each_phases_speed_is_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "rollout_flops", lambda arch, groups: 4e12)
    failure = Attempt(Problem("0", "", {}), 0, Trajectory(), answer(Phase.ATTEMPT, 9), False)
    groups = [Group(failure, (reflection(10, "stop", 3, "stop", 0.0), reflection(4, "stop", 5, "stop", 1.0)))]
    setup: Any = SimpleNamespace(
        config=Config(),
        arch=None,
        world=SimpleNamespace(size=2, gpu_name=""),
        run=SimpleNamespace(times={"time/rollout": 2.0, "time/update": 5.0}),
    )
    rollout: Any = SimpleNamespace(judge=SimpleNamespace(seconds=0.5))
    assert speed(setup, rollout, groups, {"update_flops": 30e12}) == {
        "speed/rollout_tokens": 11.0,
        "speed/verifier_share": 0.25,
        "speed/rollout_tflops": 1.0,
        "speed/update_tflops": 3.0,
    }
    assert "speed/update_tflops" not in speed(setup, rollout, groups, {}), "a step without anything to train on"
    setup.world.gpu_name = "NVIDIA H100 80GB HBM3"  # 989 TFLOP/s in BF16, 1979 in FP8
    found = []
    for precision, quantization in (("bf16", "none"), ("fp8-tensorwise", "none"), ("bf16", "fp8_per_tensor")):
        setup.config.actor.precision, setup.config.rollout.quantization = precision, quantization
        speeds = speed(setup, rollout, groups, {"update_flops": 30e12})
        found.append([round(speeds[f"speed/{phase}_tflops"] / speeds[f"speed/{phase}_mfu"]) for phase in PHASES])
    assert found == [[989, 989], [989, 1979], [1979, 989]], "each phase by the precision of its products"


def test_many_truncated_answers_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(rollout=RolloutConfig(max_answer_tokens=6))
    setup: Any = SimpleNamespace(world=SimpleNamespace(is_main=True), config=config)
    warn_of_truncated_answers(setup, 0.2)
    assert capsys.readouterr().err == ""
    warn_of_truncated_answers(setup, 0.97)
    assert "warning: 97% of the first answers were cut at rollout.max_answer_tokens=6" in capsys.readouterr().err


def test_a_skipped_update_names_its_cause() -> None:
    skipped = {"retry_success": 0.5, "groups_used": 2.0, "loss": 0.1, "grad_norm": 1.0, "updates": 1.0, "skipped": 1.0}
    skipped |= {"token_mult_prob_error": 1.0, "trained_tokens": 40.0} | SAMPLED
    for rejected, cause in ((40.0, "all tokens rejected"), (39.0, "NaN or Inf gradient")):
        line = summary(skipped | {"rejected_tokens": rejected}, Config(), Counters(step=7))
        shown = f"step    7/1750  retry success 0.500  groups 2/32  {cause}: update skipped"
        assert line == f"{shown}  reflection 9 tok (0% cut)  1 tok/s"


def test_some_of_a_steps_updates_may_be_skipped() -> None:
    metrics = {"retry_success": 0.5, "groups_used": 8.0, "loss": 0.1, "kl": 0.1, "grad_norm": 1.0, "updates": 4.0}
    metrics |= {"token_mult_prob_error": 1.0, "trained_tokens": 40.0} | SAMPLED
    for skipped, rejected, said in (
        (1.0, 0.0, "NaN or Inf gradient: 1 of 4 updates skipped"),
        (1.0, 9.0, "NaN or Inf gradient, or all tokens rejected: 1 of 4 updates skipped"),
        (4.0, 40.0, "all tokens rejected: 4 of 4 updates skipped"),
    ):
        line = summary(metrics | {"skipped": skipped, "rejected_tokens": rejected}, Config(), Counters())
        assert said in line and ("grad 1.00" in line) == (skipped < 4)


def test_a_step_in_one_line() -> None:
    metrics = {"retry_success": 0.4732, "groups_used": 31.0, "loss": -0.01, "kl": 0.00041, "grad_norm": 1.154}
    metrics |= {"token_mult_prob_error": 1.0, "skipped": 0.0} | SAMPLED
    metrics |= {"reflection_tokens": 12.4, "truncated": 0.004, "retries_truncated": 0.2}
    metrics |= {"speed/rollout_tokens": 5011.7, "speed/verifier_share": 0.2}
    config = Config()
    shown = "step    0/1750  retry success 0.473  groups 31/32  kl 0.0004  grad 1.15  reflection 12 tok (0% cut)"
    shown += "  5,012 tok/s"
    assert summary(metrics, config, Counters()) == shown
    slow = summary(metrics | {"speed/verifier_share": 0.912}, config, Counters())
    assert slow == shown.replace("  kl", "  verifier 91% of the rollout  kl")
    assert summary(metrics, config, Counters(sparse_steps=9)) == shown
    few = shown.replace("  kl", "  few for 10 steps: raise algo.group_size or failures.min_solve_rate  kl")
    assert summary(metrics, config, Counters(sparse_steps=10)) == few
    easy = summary(metrics | {"retry_success": 0.97, "loss": None}, config, Counters(sparse_steps=12))
    assert "few for 12 steps: raise algo.group_size or lower failures.max_solve_rate  nothing to train on" in easy
    cut = summary(metrics | {"retries_truncated": 0.6}, config, Counters(sparse_steps=10))
    assert (
        "few for 10 steps: 60% are cut, raise rollout.max_answer_tokens  kl" in cut
        and "(0% cut)  retries 60% cut  5,012" in cut
    )
    cut = summary(metrics | {"truncated": 1.0}, config, Counters(sparse_steps=10))
    assert (
        "few for 10 steps: 100% are cut, raise rollout.max_reflection_tokens  kl" in cut and "(100% cut)  5,012" in cut
    )
    alike = summary(metrics | {"distinct_reflections": 1.05}, config, Counters(sparse_steps=10))
    assert "few for 10 steps: a group's reflections are alike, raise rollout.temperature  kl" in alike
    contradictory = summary(metrics | {"contradictions": 3.0}, config, Counters())
    assert "CONTRADICTION: verify accepts and rejects the same text in 3 groups  kl" in contradictory
    for success, step, said in (
        (0.0, 11, ": there were more before, has too high an actor.lr broken the model?"),
        (0.0, 10, ": 100% are cut, raise rollout.max_reflection_tokens"),
        (0.01, 11, ": 100% are cut, raise rollout.max_reflection_tokens"),
    ):
        lost = metrics | {"retry_success": success, "truncated": 1.0, "loss": None}
        line = summary(lost, config, Counters(step=step, sparse_steps=10))
        assert f"few for 10 steps{said}  nothing to train on: no update  reflection 12 tok (100% cut)" in line
    config.algo.kl_beta, config.failures.source = 0.0, "online"
    assert "few for 10 steps: raise algo.group_size  grad" in summary(metrics, config, Counters(sparse_steps=10))
    assert summary(metrics, config, Counters()) == shown.replace("  kl 0.0004", ""), "without a reference there is none"
    mismatched = summary(metrics | {"token_mult_prob_error": 1.07}, config, Counters())
    assert "MISMATCH: token_mult_prob_error 1.070 > train.mismatch_warn=1.05" in mismatched
