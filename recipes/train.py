"""The loop: reflect, retry, reward (arXiv 2505.24726).

             refit                                   the policy's weights into vLLM, if it has none or older ones
failures -> reflections -> retries -> rewards        vLLM and the verifier, every rank's share
             group advantages -> policy update       megatron-core, on the reflections' tokens only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from nemo_r3 import entry, runtime, signals
from nemo_r3.algo.batch import build_update
from nemo_r3.errors import VerifierError
from nemo_r3.progress import Pace
from recipes.bank import failure_source, open_bank
from recipes.counters import reason_to_stop
from recipes.held_out import HeldOut
from recipes.layers import Layers
from recipes.metrics import NO_UPDATE, measures, report_memory, speed, summary
from recipes.outcome import conclude, conclude_early, draw_curve
from recipes.setup import join
from recipes.start import refit_if_behind, start_rollout, start_trainer


def train(argv: Sequence[str]) -> None:
    """`python -m recipes.train CONFIG.yaml key=value ...`; the same command on the same directory resumes."""
    setup = join(argv)
    from recipes import checkpoints  # megatron-core: after `join`

    world, run, progress, config = setup.world, setup.run, setup.progress, setup.config
    checkpoints.open_run(setup)
    if checkpoints.is_finished(setup):
        return conclude(setup, argv)
    bank, trainer = open_bank(setup), start_trainer(setup)
    checkpoints.check_start_fits(setup, trainer)
    rollout = start_rollout(setup, trains=True)
    source, held_out = failure_source(setup, bank, trainer.policy, rollout), HeldOut(setup, trainer.policy, rollout)
    counters, last_checkpoint = checkpoints.resume(setup, trainer, rollout)
    source.cursor, saved_step = counters.cursor, counters.step
    layers = Layers(setup, trainer.policy.module, counters)
    saver, pace = checkpoints.make_saver(setup, trainer, rollout), Pace(config.train.steps)

    try:
        for step in range(counters.step + 1, config.train.steps + 1):
            world.leave_if_asked()
            progress.begin(f"step {step}/{config.train.steps}")
            refit_if_behind(setup, trainer.policy, rollout)
            metrics = NO_UPDATE | held_out.measured(step)
            runtime.seed_generators(config.seed, step)
            with run.timed("rollout"):
                groups = rollout.reflect_and_retry(source.draw(step), step, config.algo.group_size)
            batch = build_update(groups, config, seed=runtime.step_seed(config.seed, step))

            if batch.rows:
                progress.during("update")
                with layers.watched(counters), run.timed("update"):
                    rollout.engine.sleep()
                    metrics |= trainer.update(batch)

            metrics |= measures(groups, batch) | speed(setup, rollout, groups, metrics)
            counters = layers.move_worst_to_bf16(counters.after(step, source.cursor, metrics, config.train))
            report_memory(setup, trainer, rollout, step)
            run.log_rollouts(step, groups, batch)
            run.log(step, metrics)
            progress.say(f"{summary(metrics, config, counters)}  {pace.after(step)}")
            with run.timed("save"):
                if saved := saver.after(step, asdict(counters)):
                    saved_step, last_checkpoint = step, saved
            if saved_step == step:
                draw_curve(setup)
            if reason := reason_to_stop(counters, config.train, last_checkpoint, groups, metrics):
                checkpoints.give_up(setup, saver, counters, saved_step, reason)
    except (signals.Stopped, VerifierError) as end:
        if counters.step > saved_step:
            saver.save(counters.step, asdict(counters))
        saver.finish()
        checkpoints.save_turns(setup, rollout, counters.step + 1)
        conclude_early(setup, end, counters.step)
        raise
    saver.finish()
    conclude(setup, argv)
    rollout.engine.end()


if __name__ == "__main__":
    entry.main(train)
