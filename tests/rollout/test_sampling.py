from __future__ import annotations

import itertools

from nemo_r3.rollout.sampling import request_seed
from nemo_r3.types import Phase


def test_request_seed_never_changes() -> None:
    assert request_seed(1, 0, "countdown-1-2-3-7", 4, Phase.REFLECTION) == 2148938981524069028


def test_every_part_of_the_key_matters() -> None:
    keys = itertools.product((1, 2), (0, 11), ("a", "a1"), (0, 1), (Phase.REFLECTION, Phase.RETRY))
    seeds = [request_seed(*key) for key in keys]
    assert len(set(seeds)) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)
