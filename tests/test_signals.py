"""Requests to stop and signs of life, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

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
signals.watch(2.0)
def forgotten():
    time.sleep(60)
for _ in range(3):
    time.sleep(1.0)
    signals.alive()
forgotten()
"""


@pytest.mark.parametrize("first", ["SIGUSR1", "SIGTERM"])
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
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_without_a_sign_of_life_the_stacks_are_shown_and_the_process_ends() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGALRM
    assert "in forgotten" in done.stderr and "Timeout" in done.stderr
    assert time.monotonic() - begun > 5  # three signs of life, a second apart, then 2.2 seconds
