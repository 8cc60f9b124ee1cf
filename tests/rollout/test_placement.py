"""How engines are laid out over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch.distributed as dist
from pytest import MonkeyPatch

from nemo_r3.rollout.placement import Fleet
from nemo_r3.runtime import World


def test_a_rank_waits_for_no_other_engines_ranks(monkeypatch: MonkeyPatch) -> None:
    made: list[tuple[list[int], bool]] = []

    def new_group(ranks: Iterable[int], *_: Any, use_local_synchronization: bool = False) -> None:
        made.append((list(ranks), use_local_synchronization))

    monkeypatch.setattr(dist, "new_group", new_group)
    Fleet(cast(World, SimpleNamespace(rank=13, size=512, timeout=timedelta(minutes=30))), tensor_parallel=8)
    assert made == [([8, 9, 10, 11, 12, 13, 14, 15], True)]
