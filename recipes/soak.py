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
from nemo_r3 import entry
from nemo_r3.actor.manifest import complete, is_sound, latest_step
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.files import write_whole
from recipes.fault_injection import PATIENCE, Launch, differences, is_newer, ranks_of, untimed

MINING = "while mining"
KINDS = ("while saving", "at random", "while saving", "SIGUSR1")
PAUSE = 1.5
"""Most seconds from the first sign of mining or of a step to the kill, or to waiting for the save to be hit."""
SAVE = 0.15
"""Most seconds from the beginning of that save to the kill."""
WORK = ("kills", "cut_saves", "rounds", "seconds")
"""The counts of a `Tally` that are no harm."""


@dataclass
class Tally:
    """Counts over all kills so far."""

    kills: dict[str, int] = field(default_factory=dict)  # by kind
    cut_saves: int = 0  # kills that left a save half done
    rounds: int = 0  # runs that finished in spite of their kills
    seconds: float = 0.0  # how long the killed runs ran
    corrupt_checkpoints: int = 0  # checkpoints whose manifest is cut, or whose files do not match its hashes
    lost_checkpoints: int = 0  # kills after which the newest checkpoint was older than before
    lost_failure_rows: int = 0  # rows of the undisturbed run's mined shards that are missing
    double_counted_steps: int = 0  # repeated steps in metrics.jsonl
    differing_steps: int = 0  # steps whose metrics differ from the undisturbed run's
    differing_rounds: int = 0  # finished runs that differ from the undisturbed one

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    @property
    def harm(self) -> dict[str, int]:
        """What no kill may do, where the count is not 0."""
        return {name: count for name, count in asdict(self).items() if name not in WORK and count}


def soak(argv: Sequence[str]) -> None:
    """`python -m recipes.soak CONFIG.yaml key=value ...`, up to `drill.kills` kills; an error on any harm."""
    config = configuration.load(argv)
    home, ranks = Path(config.run.dir), ranks_of(config)
    home.mkdir(parents=True, exist_ok=True)
    file = home / "tally.json"
    tally = Tally(**json.loads(file.read_text())) if file.exists() else Tally()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `interrupt` then kills its run
    whole = Launch(argv, ranks, home / "whole")
    patience = PATIENCE * max(whole.finish(), 30.0)
    while tally.total < config.drill.kills and not tally.harm:
        killed = Launch(argv, ranks, home / f"round_{tally.rounds + 1:03d}")
        outcome = kill(killed, whole.path, config, tally, patience)
        write_whole(file, json.dumps(asdict(tally), indent=1) + "\n")
        print(f"{killed.path.name}: {outcome}, at step {latest_step(killed.checkpoints)}", flush=True)
    print(json.dumps(asdict(tally)))
    if tally.harm:
        raise UserError(f"{file}: {tally.harm}; {home} is left as it is, to be looked at")


def kill(launch: Launch, whole: Path, config: Config, tally: Tally, patience: float) -> str:
    """Starts the run, kills it, and adds to the tally what that did.

    Returns:
        What happened, in words.
    """
    step, shards = latest_step(launch.checkpoints), mined_shards(launch.path)
    kind, now = next_kind(launch.path, tally.total), time.time()
    waits = waits_of(launch, kind, random.Random(f"{config.seed}/{tally.total}"))
    code, lived = launch.interrupt(kind, waits, patience)
    tally.seconds = round(tally.seconds + lived, 1)
    tally.corrupt_checkpoints += sum(not is_sound(path) for path in complete(launch.checkpoints))
    tally.lost_checkpoints += latest_step(launch.checkpoints) < step
    for name in shards | mined_shards(launch.path):
        tally.lost_failure_rows += rows_lost(launch.path / "failures" / name, whole / "failures" / name)
    ours, theirs = (untimed(path / "metrics.jsonl") for path in (launch.path, whole))
    tally.double_counted_steps += len(ours) - len({line["step"] for line in ours})
    tally.differing_steps += sum(line not in theirs for line in ours)
    if code == 0:
        tally.rounds += 1
        tally.differing_rounds += bool(differences(whole, launch.path, config.train.steps))
        return f"came to its end after {lived:.1f} s"
    tally.cut_saves += is_newer(launch.writing, now)
    tally.kills[kind] = tally.kills.get(kind, 0) + 1
    return f"kill {tally.total}/{config.drill.kills} {kind} after {lived:.1f} s"


def mined_shards(path: Path) -> set[str]:
    """The names of a run's shards of the failure bank."""
    return {shard.name for shard in path.glob("failures/shard_*.jsonl")}


def next_kind(path: Path, number: int) -> str:
    """How the next launch is killed: until the bank is complete, three of four times while mining."""
    index = path / "failures" / "bank.json"
    mined = index.exists() and json.loads(index.read_text())["complete"]
    return KINDS[number % len(KINDS)] if mined or number % 4 == 0 else MINING


def waits_of(launch: Launch, kind: str, draw: random.Random) -> list[Path | float]:
    """What comes before a kill: soon after the run has begun to mine or to train, or during the save after that."""
    sign = launch.path / ("failures/bank.json" if kind == MINING else "metrics.jsonl")
    waits: list[Path | float] = [sign, draw.uniform(0.0, PAUSE)]
    return [*waits, launch.writing, draw.uniform(0.0, SAVE)] if kind == "while saving" else waits


def rows_lost(shard: Path, whole: Path) -> int:
    """How many rows of the undisturbed run's shard this one lacks."""
    rows = set(shard.read_text().splitlines()) if shard.exists() else set()
    return len(set(whole.read_text().splitlines()) - rows)


if __name__ == "__main__":
    entry.main(soak)
