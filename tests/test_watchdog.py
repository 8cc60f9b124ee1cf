"""Signs of life, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

HANGS = """
import time
from nemo_r3 import watchdog
watchdog.LOOK = 0.1
watchdog.watch(2.0)
def forgotten():
    time.sleep(60)
for _ in range(3):
    time.sleep(1.0)
    watchdog.alive()
forgotten()
"""


def test_without_a_sign_of_life_the_stacks_are_shown_and_the_process_ends() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGALRM
    assert "in forgotten" in done.stderr and "Timeout" in done.stderr
    said = "error: no sign of life for 2 s: without one this process ends soon (run.timeout_minutes=0.0333333)"
    assert done.stderr.startswith(said)
    assert time.monotonic() - begun > 5  # three signs of life, a second apart, then 2.2 seconds


TASK = """
import time
from nemo_r3 import tasks, watchdog
from nemo_r3.config.task import DialogueConfig, TaskConfig
watchdog.LOOK = 0.1
import nemo_r3.tasks.countdown, endless  # takes a busy machine seconds
with watchdog.watched(2.0):
    tasks.load(TaskConfig("countdown", {"size": 20, "test_size": 5}), DialogueConfig())
time.sleep(3)
print("not watched")
with watchdog.watched(2.0):
    tasks.load(TaskConfig("endless"), DialogueConfig())
"""


def test_a_task_that_never_ends_giving_problems_is_watched_and_only_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("def problems(split):\n    while True:\n        pass\nverify = None\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", TASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "not watched\n")
    assert done.stderr.count("error: no sign of life") == 1 and "endless.py" in done.stderr
