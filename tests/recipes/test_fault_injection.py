"""How many ranks a drill launches, and signals to runs that end before they can take them."""

from __future__ import annotations

import subprocess
import sys
from signal import SIGUSR1

import pytest

from nemo_r3.config import Config
from nemo_r3.errors import UserError
from recipes import fault_injection


def test_a_launcher_that_ends_before_its_ranks_have_a_handler_is_not_waited_for() -> None:
    """A zombie's list of children can still be read, and is empty."""
    launcher = subprocess.Popen([sys.executable, "-c", "pass"])
    fault_injection._send(launcher, 2, SIGUSR1)
    assert launcher.returncode == 0


def test_the_signal_comes_once_the_run_has_a_handler_for_it() -> None:
    code = "import signal, time; time.sleep(0.3); signal.signal(signal.SIGUSR1, lambda *_: exit(75)); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", code])
    fault_injection._send(run, 1, SIGUSR1)
    assert run.wait(30) == 75


def test_a_drill_has_as_many_ranks_as_the_config_asks_for_or_as_its_engines_and_experts_need() -> None:
    config = Config()
    config.rollout.deterministic = True
    config.rollout.tensor_parallel = 2
    assert fault_injection.ranks_of(config) == 2
    config.actor.pipeline_parallel, config.actor.expert_parallel = 2, 4
    assert fault_injection.ranks_of(config) == 8
    config.cluster.gpus_per_node = 16
    assert fault_injection.ranks_of(config) == 16
    config.rollout.deterministic = False
    with pytest.raises(UserError, match="rollout.deterministic: False: two runs would differ anyway"):
        fault_injection.ranks_of(config)
