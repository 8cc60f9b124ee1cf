"""What an engine is started with."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from nemo_r3.config import Config
from recipes.start import start_rollout


@pytest.mark.parametrize("trains", [True, False])
def test_only_an_engine_that_trains_records_experts_and_waits_for_weights(
    monkeypatch: pytest.MonkeyPatch, trains: bool
) -> None:
    started: list[Any] = []

    def start(config: Config, model: str, with_weights: bool) -> None:
        started.append((config.actor.routing_replay, model, with_weights))

    module = SimpleNamespace(Engine=SimpleNamespace(start=start))
    monkeypatch.setitem(sys.modules, "nemo_r3.rollout.engine", module)
    setup = MagicMock(config=Config(), model="tiny")
    setup.world.rank, setup.world.size = 0, 1
    setup.config.actor.routing_replay = True
    start_rollout(setup, trains)
    assert started == [(trains, "tiny", not trains)]
    assert setup.config.actor.routing_replay, "the run's own settings stay"
