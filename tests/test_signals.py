"""Requests to stop, in processes of their own."""

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
