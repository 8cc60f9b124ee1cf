"""Requests to stop and signs of life, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LISTENS = """
import time
from nemo_r3 import signals
signals.SAME_REQUEST = 0.5
signals.listen()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if signals.noted():
        print(signals.noted(), flush=True)
        time.sleep(1)
"""
HANGS = """
import time
from nemo_r3 import signals
signals.LOOK = 0.1
signals.watch(2.0)
def forgotten():
    time.sleep(60)
for _ in range(3):
    time.sleep(1.0)
    signals.alive()
forgotten()
"""


@pytest.mark.parametrize("first", ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGINT"])
def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(first: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[first])
    process.send_signal(signal.SIGTERM)  # at once: the same request
    assert process.stdout.readline() == f"{first}\n"
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_ctrl_c_says_what_it_does_and_ends_the_process_when_it_is_pressed_again() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", LISTENS], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert "Ctrl-C again ends this at once" in process.stderr.read()


def test_without_a_sign_of_life_the_stacks_are_shown_and_the_process_ends() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGALRM
    assert "in forgotten" in done.stderr and "Timeout" in done.stderr
    assert done.stderr.startswith(
        "error: no sign of life for 2 s: without one this process ends soon (run.timeout_minutes=0.0333333)"
    )
    assert time.monotonic() - begun > 5  # three signs of life, a second apart, then 2.2 seconds


TASK = """
import time
from nemo_r3 import signals, tasks
from nemo_r3.config.task import DialogueConfig, TaskConfig
signals.LOOK = 0.1
import nemo_r3.tasks.countdown, endless  # takes a busy machine seconds
with signals.watched(2.0):
    tasks.load(TaskConfig("countdown", {"size": 20, "test_size": 5}), DialogueConfig())
time.sleep(3)
print("not watched")
with signals.watched(2.0):
    tasks.load(TaskConfig("endless"), DialogueConfig())
"""


def test_a_task_that_never_ends_giving_problems_is_watched_and_only_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("def problems(split):\n    while True:\n        pass\nverify = None\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", TASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "not watched\n")
    assert done.stderr.count("error: no sign of life") == 1 and "endless.py" in done.stderr
