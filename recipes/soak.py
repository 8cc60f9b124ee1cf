"""The soak: kills a small run hundreds of times, and checks what each kill left behind.

<run.dir>/whole        a run to its end, undisturbed
<run.dir>/round_001    the same run, killed every few steps until it finishes, then compared; then the next round
<run.dir>/tally.json   the counts so far; the same command continues from them
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
"""Most seconds from the first sign of mining or of a step to the kill, or to waiting for the save to be hit."""
SAVE = 0.15
"""Most seconds from the beginning of that save to the kill."""


@dataclass
class Tally:
    """Counts over all kills so far: four of work done, then the harm, which should all be 0.

    Attributes:
        kills: by kind.
        cut_saves: kills that left a save half done.
        rounds: runs that finished in spite of their kills.
        seconds: how long the killed runs ran.
        corrupt_checkpoints: checkpoints whose manifest is cut, or whose files do not match its hashes.
        lost_checkpoints: kills after which the newest checkpoint was older than before.
        lost_failure_rows: rows missing from mined shards of the failure bank, compared with the undisturbed run's.
        double_counted_steps: repeated steps in metrics.jsonl.
        differing_steps: steps whose metrics differ from the undisturbed run's.
        differing_rounds: finished runs that differ from the undisturbed one.
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
        """The counts of harm that are not 0."""
        counted = asdict(self)
        return {name: counted[name] for name in list(counted)[4:] if counted[name]}


def soak(argv: Sequence[str]) -> None:
    """`python -m recipes.soak CONFIG.yaml key=value ...`, up to `drill.kills` kills; an error on any harm."""
    config = configuration.load(argv)
    home, ranks = Path(config.run.dir), ranks_of(config)
    home.mkdir(parents=True, exist_ok=True)
    file = home / "tally.json"
    tally = Tally(**json.loads(file.read_text())) if file.exists() else Tally()
    whole = Launch(argv, ranks, home / "whole")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `end` then kills the run under test
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
    """Starts the run, kills it, and adds to the tally what that did.

    Returns:
        What happened, in words.
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
    """What a kill must not lose: the step of the newest checkpoint, and the mined shards."""

    step: int
    shards: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> State:
        """Reads it from a run directory, which need not exist yet."""
        shards = path.glob("failures/shard_*.jsonl")
        return cls(latest_step(path / "checkpoints"), frozenset(shard.name for shard in shards))


def next_kind(path: Path, number: int) -> str:
    """How the next launch is killed: until the bank is complete, three of four times while mining."""
    index = path / "failures" / "bank.json"
    mined = index.exists() and json.loads(index.read_text())["complete"]
    return KINDS[number % len(KINDS)] if mined or number % 4 == 0 else MINING


def end(launch: Launch, kind: str, draw: random.Random, patience: float) -> tuple[int, float]:
    """Starts the run and kills or stops it soon after it has begun to mine or to train, unless it finishes first.

    Args:
        launch: the run.
        kind: how it ends, one of KINDS or MINING.
        draw: for the moment.
        patience: seconds after which it counts as hung.

    Returns:
        Its exit code, and how many seconds it ran.

    Raises:
        UserError: it hung, or ended in another way.
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
    except BaseException:  # a fault, or the soak itself is stopped: leave no run behind
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
    """How many rows of the undisturbed run's shard this one lacks."""
    found = set(shard.read_text().splitlines()) if shard.exists() else set()
    return len(set(whole.read_text().splitlines()) - found)


if __name__ == "__main__":
    runtime.main(soak)
