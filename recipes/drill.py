"""The drill: a run that is killed again and again must come to what the same run comes to undisturbed.

<run.dir>/drill/whole        the run to its end, undisturbed
<run.dir>/drill/round_001    the same run, killed every few steps until it finishes; then the next round
<run.dir>/drill/tally.json   the counts so far: a drill that was stopped goes on, one that is over begins again
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.actor.manifest import complete, is_sound, latest_step
from nemo_r3.errors import UserError
from nemo_r3.files import write_whole
from recipes.fault_injection import Launch, is_newer, ranks_of, untimed

MINING = "while mining"
KINDS = ("while saving", "SIGUSR1", "while saving", "at random")
PAUSE = 2.0
"""Most steps from the first sign of mining or the first step to the kill, or to waiting for the save to be hit."""
SAVE = 0.15
"""Most seconds from the beginning of that save to the kill."""
PATIENCE = 5.0
"""A run counts as hung after this many times the duration of the undisturbed one, which may have been in parts."""


@dataclass
class Tally:
    """What was done so far, and what came of it."""

    kills: dict[str, int] = field(default_factory=dict)  # by kind
    cut_saves: int = 0  # kills that left a save half done
    rounds: int = 0  # runs that finished in spite of their kills
    seconds: float = 0.0  # how long the killed runs ran
    harm: list[str] = field(default_factory=list)  # what was lost or changed, which no kill may do, a line each

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())


def drill(argv: Sequence[str]) -> None:
    """`python -m recipes.drill CONFIG.yaml key=value ...`: `drill.kills` kills in all; an error on any harm."""
    config = configuration.load(argv)
    home, ranks, kills = Path(config.run.dir) / "drill", ranks_of(config), config.drill.kills
    file = home / "tally.json"
    tally = Tally(**json.loads(file.read_text())) if file.exists() else Tally()
    ended = not round_of(home, tally).exists()
    if ended and tally.total >= kills and not tally.harm:
        shutil.rmtree(home)
        tally = Tally()
    home.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `interrupt` then kills its run
    whole = Launch(argv, ranks, home / "whole")
    patience = PATIENCE * (max(whole.finish(), 30.0) + sum(step_seconds(whole.path)))
    while not (tally.harm or (ended and tally.total >= kills)):
        killed = Launch(argv, ranks, round_of(home, tally))
        ended = kill(killed, whole.path, tally, kills, patience)
        write_whole(file, json.dumps(asdict(tally), indent=1) + "\n")
    for line in tally.harm:
        print(f"differs: {line}")
    if tally.harm:
        raise UserError(f"kills have left a trace; {home} is left as it is, to be looked at")
    print(f"{json.dumps(asdict(tally))}\nno harm: failure bank, metrics and rollouts are those of the run left alone")


def round_of(home: Path, tally: Tally) -> Path:
    """The run of the round that is not over, or of the next one, which is not there yet."""
    return home / f"round_{tally.rounds + 1:03d}"


def kill(launch: Launch, whole: Path, tally: Tally, kills: int, patience: float) -> bool:
    """Starts the run, kills it unless that has been done `kills` times, and adds to the tally what came of it.

    Returns:
        Whether the run came to its end.
    """
    step, shards, now = latest_step(launch.checkpoints), list(launch.path.glob("failures/shard_*.jsonl")), time.time()
    kind = next_kind(launch.path, whole, tally.total)
    waits = (
        waits_of(launch, kind, PAUSE * statistics.median(step_seconds(whole))) if tally.total < kills else [math.inf]
    )
    code, lived = launch.interrupt(kind, waits, patience)
    ended, newest = code == 0, latest_step(launch.checkpoints)
    tally.harm += [f"{path} is damaged" for path in complete(launch.checkpoints) if not is_sound(path)]
    tally.harm += [f"{launch.checkpoints} went back from step {step} to {newest}"] if newest < step else []
    tally.harm += [f"{shard} is lost" for shard in shards if not shard.exists()]
    tally.harm += differences(whole, launch.path, ended)
    tally.seconds = round(tally.seconds + lived, 1)
    if ended:
        tally.rounds += 1
    else:
        tally.cut_saves += is_newer(launch.writing, now)
        tally.kills[kind] = tally.kills.get(kind, 0) + 1
    what = "came to its end" if ended else f"kill {tally.total}/{kills} {kind}"
    print(f"{launch.path.name}: {what} after {lived:.1f} s, at step {newest}", flush=True)
    return ended


def next_kind(run: Path, whole: Path, number: int) -> str:
    """How the next launch is killed: until its failure bank is complete, three of four times while mining."""
    index = run / "failures" / "bank.json"
    mined = index.exists() and json.loads(index.read_text())["complete"]
    mines = (whole / "failures").exists() and not mined
    return MINING if mines and number % 4 else KINDS[number % 4]


def waits_of(launch: Launch, kind: str, pause: float) -> list[Path | float]:
    """What comes before a kill: soon after the run has begun to mine or done a step, or during the save after that.

    The sign of a step is its rollouts: a run that resumes writes its logs anew before that.
    """
    step = f"rollouts/step_{latest_step(launch.checkpoints) + 1:06d}.jsonl"
    sign = launch.path / ("failures/bank.json" if kind == MINING else step)
    waits: list[Path | float] = [sign, random.uniform(0.0, pause)]
    return [*waits, launch.writing, random.uniform(0.0, SAVE)] if kind == "while saving" else waits


def step_seconds(run: Path) -> list[float]:
    """How long a run's steps took."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        sum(value for key, value in line.items() if key.startswith("time/") and not key.startswith("time/cpu_"))
        for line in lines
    ]


def differences(whole: Path, killed: Path, ended: bool) -> list[str]:
    """How the killed run differs from the undisturbed one, as far as it has come, a line each."""
    ours, theirs = (untimed(path / "metrics.jsonl") for path in (killed, whole))
    steps = zip_longest(ours, theirs if ended else theirs[: len(ours)])
    differing = [f"line {number} of metrics.jsonl: {a} != {b}" for number, (a, b) in enumerate(steps, 1) if a != b]
    runs = (whole, killed) if ended else (killed,)
    for pattern in ("failures/shard_*.jsonl", "rollouts/step_*.jsonl"):
        files = {file.relative_to(run) for run in runs for file in run.glob(pattern)}
        differing += [str(file) for file in sorted(files) if _content(killed / file) != _content(whole / file)]
    return differing


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


if __name__ == "__main__":
    entry.main(drill)
