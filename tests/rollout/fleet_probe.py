"""Two ranks, which are a pipeline and one engine: prints what each hears of the other's wish to stop.

torchrun --nproc-per-node 2 fleet_probe.py
"""

from __future__ import annotations

from nemo_r3 import runtime
from nemo_r3.actor import cpu
from nemo_r3.actor.model import start_parallel_groups
from nemo_r3.config import ActorConfig, Config, RolloutConfig
from nemo_r3.rollout.placement import STEPS_BETWEEN_VOTES, Fleet

if __name__ == "__main__":
    config = Config(actor=ActorConfig(pipeline_parallel=2), rollout=RolloutConfig(tensor_parallel=2))
    config.run.timeout_minutes = 1
    world = runtime.start(config)
    cpu.prepare()
    with cpu.cuda_stand_in():
        start_parallel_groups(config)
    fleet = Fleet(world, tensor_parallel=2)
    heard = [fleet.asked_to_stop(failed=world.rank == 1) for _ in range(STEPS_BETWEEN_VOTES)]
    if world.is_main:
        print(heard.count(True), heard[-1])
