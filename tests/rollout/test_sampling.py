from __future__ import annotations

import itertools

from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.rollout.sampling import request_seed, steps_in_order
from nemo_r3.types import Phase


def test_request_seed_never_changes() -> None:
    assert request_seed(1, 0, "countdown-1-2-3-7", 4, Phase.REFLECTION) == 2148938981524069028


def test_every_part_of_the_key_matters() -> None:
    keys = itertools.product((1, 2), (0, 11), ("a", "a1"), (0, 1), (Phase.REFLECTION, Phase.RETRY))
    seeds = [request_seed(*key) for key in keys]
    assert len(set(seeds)) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_engine_steps_are_ordered_where_results_repeat_or_ranks_must_agree() -> None:
    assert steps_in_order(RolloutConfig(), on_cuda=False)
    assert not steps_in_order(RolloutConfig(), on_cuda=True)
    assert steps_in_order(RolloutConfig(deterministic=True), on_cuda=True)
    assert not steps_in_order(RolloutConfig(deterministic=False), on_cuda=False)
    assert steps_in_order(RolloutConfig(deterministic=False, tensor_parallel=2), on_cuda=True)
