"""The loop: reflect, retry, reward (arXiv 2505.24726).

failures -> reflections -> retries -> rewards        vLLM and the verifier, every rank's share
             group advantages -> one policy update   megatron-core, on the reflections' tokens only
             refit                                   the new weights into vLLM
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from nemo_r3 import runtime, signals
from nemo_r3.algo.batch import build_update
from nemo_r3.config import TrainConfig
from nemo_r3.errors import UserError
from nemo_r3.refit import refit
from nemo_r3.report import curve
from nemo_r3.types import Group
from recipes import session
from recipes.counters import Counters, hopeless
from recipes.layers import Layers


def train(argv: Sequence[str]) -> None:
    """`python -m recipes.train CONFIG.yaml key=value ...`; the same command on the same directory resumes."""
    ground = session.join(session.plan(argv))
    world, run, config = ground.world, ground.run, ground.plan.config

    run.open(resuming=session.newest_checkpoint(ground) is not None)
    bank = session.open_bank(ground)
    policy = session.start_policy(ground)
    rl = session.start_engine(ground)
    source = session.failure_source(bank, ground, rl)
    at = Counters(**session.resume(ground, policy, rl))
    layers = Layers(ground, policy, rl, at)
    source.cursor, saved, saver = at.cursor, at.step, session.saver(ground, policy, rl)
    run.cut_back(at.step)

    try:
        for step in range(at.step + 1, config.train.steps + 1):
            world.leave_if_asked()
            runtime.seed_step(config.seed, step)
            rl.progress.begin(f"step {step}/{config.train.steps}")

            with run.timed("rollout"):
                groups = rl.rollout.reflect_and_retry(source.draw(step), step, config.algo.group_size)
            batch = build_update(groups, config, seed=config.seed * 1_000_003 + step)
            rates = rl.progress.rates()

            metrics: dict[str, float | None] = {"loss": None, "grad_norm": None, "token_mult_prob_error": None}
            if batch.rows:
                rl.progress.during("update")
                with layers.watched(at), run.timed("update"):
                    rl.engine.sleep()
                    metrics = dict(policy.update(batch))
                rl.progress.during("refit")
                with run.timed("refit"):
                    refit(policy, rl.engine)

            at = layers.relieve(at.after(step, source.cursor, metrics, config.train))
            metrics |= session.speed(ground, groups, metrics)
            metrics |= measures(groups) | {"groups_used": batch.groups_used, "groups_dropped": batch.groups_dropped}
            session.report_memory(ground, policy, rl, step)
            run.log_rollouts(step, groups, batch)
            run.log(step, metrics)
            rl.progress.say(f"step {step:>4}/{config.train.steps}  {summary(metrics, config.train)}  {rates}")
            with run.timed("save"):
                saver.finish_if_written()
                if step % config.train.save_every == 0 or step == config.train.steps:
                    saved = saver.save(step, asdict(at))
            if reason := hopeless(at, config.train, f"{run.checkpoints}/step_{saved:06d}" if saved else "none yet"):
                saver.finish()
                raise UserError(reason)
    except signals.Stopped:
        if at.step > saved:
            saver.save(at.step, asdict(at))
        saver.finish()
        session.keep_turns(ground, rl, at.step + 1)
        raise
    saver.finish()
    run.add_to_summary(versions=session.versions())
    if world.is_main and at.step:
        curve(run.metrics, run.path / "curve.png")


def measures(groups: Sequence[Group]) -> dict[str, float | None]:
    """What a step's rollouts say, whether or not they are trained on."""
    reflections = [reflection for group in groups for reflection in group.reflections]
    return {
        "reward": statistics.fmean(reflection.reward for reflection in reflections),
        "retry_success": statistics.fmean(reflection.reward for reflection in reflections),
        "reflection_tokens": statistics.fmean(len(reflection.answer.segment.ids) for reflection in reflections),
        "retry_tokens": statistics.fmean(len(reflection.retry.segment.ids) for reflection in reflections),
        "truncated": statistics.fmean(reflection.answer.finish_reason == "length" for reflection in reflections),
    }


def summary(metrics: dict[str, float | None], config: TrainConfig) -> str:
    """A step in one line."""
    line = f"retry success {metrics['retry_success']:.3f}  groups {metrics['groups_used']:.0f}"
    if metrics["loss"] is None:
        return f"{line}  nothing to train on: no update"
    if not (drift := metrics["token_mult_prob_error"] or 0) <= config.drift_warn:
        line += f"  DRIFT: token_mult_prob_error {drift:.3f} > train.drift_warn={config.drift_warn}"
    if metrics["skipped"]:
        rejected = metrics["rejected_tokens"] == metrics["trained_tokens"]
        return f"{line}  {'all tokens rejected' if rejected else 'NaN or Inf gradient'}: update skipped"
    return f"{line}  loss {metrics['loss']:+.4f}  grad {metrics['grad_norm']:.3f}"


if __name__ == "__main__":
    runtime.main(train)
