"""The soak: a small run is killed hundreds of times, and what every kill leaves behind is checked.

<run.dir>/whole        trains to its end
<run.dir>/round_001    is killed every few steps, from mining to its end, and compared with it; then the next round
<run.dir>/tally.json   counts over all calls: the same command goes on where the last one ended
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_r3 import config as configuration
from nemo_r3 import runtime, signals
from nemo_r3.actor.manifest import WRITING, complete, is_sound, latest_step
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.files import write_whole
from recipes.drill import PATIENCE, Launch, differences, ranks_of, send, untimed

MINING = "while mining"
KINDS = ("while saving", "at random", "while saving", "SIGUSR1")
PAUSE = 1.5
"""Seconds, at most, from the first sign of mining or of steps to the kill, or to the save that is aimed at."""
SAVE = 0.15
"""Seconds, at most, from the beginning of that save to the kill."""


@dataclass
class Tally:
    """What all kills so far came to; all but the first four should be 0.

    Attributes:
        kills: by kind.
        cut_saves: kills that left a save half done.
        rounds: runs that came to their end, kill after kill.
        seconds: spent on that.
        corrupt_checkpoints: with a manifest that is cut, or whose hashes do not agree with the files.
        lost_checkpoints: kills after which the newest checkpoint was an older one than before.
        lost_failure_rows: rows of the failure bank that were mined and are gone, or are others.
        double_counted_steps: steps that metrics.jsonl has more than once.
        differing_steps: steps with other metrics than those of the run that is left alone.
        differing_rounds: rounds that ended otherwise than the run that is left alone.
    """

    kills: dict[str, int] = field(default_factory=dict)
    cut_saves: int = 0
    rounds: int = 0
    seconds: float = 0.0
    corrupt_checkpoints: int = 0
    lost_checkpoints: int = 0
    lost_failure_rows: int = 0
    double_counted_steps: int = 0
    differing_steps: int = 0
    differing_rounds: int = 0

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    @property
    def harm(self) -> dict[str, int]:
        """What should be 0 and is not."""
        counted = asdict(self)
        return {name: counted[name] for name in list(counted)[4:] if counted[name]}


def soak(argv: Sequence[str]) -> None:
    """`python -m recipes.soak CONFIG.yaml key=value ...`, until `drill.kills` kills are counted; 1 on any harm."""
    config = configuration.load(argv)
    home, ranks = Path(config.run.dir), ranks_of(config)
    home.mkdir(parents=True, exist_ok=True)
    file = home / "tally.json"
    tally = Tally(**json.loads(file.read_text())) if file.exists() else Tally()
    whole = Launch(argv, ranks, home / "whole")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, leaves no run behind
    begun = time.monotonic()
    if code := whole.start().wait():
        raise UserError(f"the run that is left alone ended with code {code}; see {whole.path}.log")
    patience = PATIENCE * max(time.monotonic() - begun, 30.0)
    while tally.total < config.drill.kills and not tally.harm:
        killed = Launch(argv, ranks, home / f"round_{tally.rounds + 1:03d}")
        said = kill(killed, whole.path, config, tally, patience)
        write_whole(file, json.dumps(asdict(tally), indent=1) + "\n")
        print(f"{killed.path.name}: {said}, at step {State.of(killed.path).step}", flush=True)
    print(json.dumps(asdict(tally)))
    if tally.harm:
        raise UserError(f"{file}: {tally.harm}; {home} is left as it is, to be looked at")


def kill(launch: Launch, whole: Path, config: Config, tally: Tally, patience: float) -> str:
    """Starts the run, ends it, and adds what that did to the tally.

    Returns:
        How it ended, in words.
    """
    before, kind, now = State.of(launch.path), next_kind(launch.path, tally.total), time.time()
    code, lived = end(launch, kind, random.Random(f"{config.seed}/{tally.total}"), patience)
    after = State.of(launch.path)
    tally.seconds = round(tally.seconds + lived, 1)
    tally.corrupt_checkpoints += sum(not is_sound(found) for found in complete(launch.path / "checkpoints"))
    tally.lost_checkpoints += after.step < before.step
    mined = sorted(before.shards | after.shards)
    tally.lost_failure_rows += sum(
        rows_lost(launch.path / "failures" / name, whole / "failures" / name) for name in mined
    )
    ours, theirs = (untimed(path / "metrics.jsonl") for path in (launch.path, whole))
    tally.double_counted_steps += len(ours) - len({line["step"] for line in ours})
    tally.differing_steps += sum(line not in theirs for line in ours)
    if code == 0:
        tally.rounds += 1
        tally.differing_rounds += bool(differences(whole, launch.path, config.train.steps))
        return f"came to its end after {lived:.1f} s"
    tally.cut_saves += _is_newer(launch.path / "checkpoints" / WRITING, now)
    tally.kills[kind] = tally.kills.get(kind, 0) + 1
    return f"kill {tally.total}/{config.drill.kills} {kind} after {lived:.1f} s"


@dataclass(frozen=True)
class State:
    """What a kill must not take away: the newest checkpoint's step, and the shards that are mined."""

    step: int
    shards: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> State:
        """Of a run directory, or of none yet."""
        shards = path.glob("failures/shard_*.jsonl")
        return cls(latest_step(path / "checkpoints"), frozenset(shard.name for shard in shards))


def next_kind(path: Path, number: int) -> str:
    """How the next launch ends; as long as the bank is not whole, three of four are ended while they mine."""
    index = path / "failures" / "bank.json"
    mined = index.exists() and json.loads(index.read_text())["complete"]
    return KINDS[number % len(KINDS)] if mined or number % 4 == 0 else MINING


def end(launch: Launch, kind: str, draw: random.Random, patience: float) -> tuple[int, float]:
    """Starts the run and ends it soon after it has begun to mine or to step; it may come to its end before.

    Returns:
        Its exit code, and the seconds that it lived.

    Raises:
        UserError: it hung, or ended otherwise than it was made to.
    """
    process, begun, now = launch.start(), time.monotonic(), time.time()

    def until(sign: Path) -> None:
        while process.poll() is None and not _is_newer(sign, now):
            if time.monotonic() - begun > patience:
                send(process.pid, launch.ranks, signal.SIGKILL)
                raise UserError(f"{sign} did not appear within {patience:.0f} s; see {launch.path}.log")
            time.sleep(0.002)

    try:
        until(launch.path / ("failures/bank.json" if kind == MINING else "metrics.jsonl"))
        time.sleep(draw.uniform(0.0, PAUSE))
        if kind == "while saving":
            until(launch.path / "checkpoints" / WRITING)
            time.sleep(draw.uniform(0.0, SAVE))
        if process.poll() is None:
            send(process.pid, launch.ranks, signal.SIGUSR1 if kind == "SIGUSR1" else signal.SIGKILL)
        code = process.wait(patience)
    except BaseException:  # the soak itself is stopped, by hand or by a fault: it leaves no run behind
        send(process.pid, launch.ranks, signal.SIGKILL)
        raise
    allowed = (0, signals.STOPPED) if kind == "SIGUSR1" else (0, -signal.SIGKILL)
    if code not in allowed:
        raise UserError(f"{kind}: the run ended with code {code}; see {launch.path}.log")
    return code, time.monotonic() - begun


def _is_newer(file: Path, time: float) -> bool:
    try:
        return file.stat().st_mtime > time
    except FileNotFoundError:
        return False


def rows_lost(shard: Path, whole: Path) -> int:
    """How many rows of the bank of the run that is left alone this shard lacks."""
    found = set(shard.read_text().splitlines()) if shard.exists() else set()
    return len(set(whole.read_text().splitlines()) - found)


if __name__ == "__main__":
    runtime.main(soak)
