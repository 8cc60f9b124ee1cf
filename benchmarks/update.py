"""What the layout of rows is worth: the policy update with shared contexts, packed rows and padded rows.

    python -m benchmarks.update [--small]     -> benchmarks/results/update.json, docs/update_cost.png

The same groups, the same model and the same code in one process, taking turns; only the rows differ:

    shared    a group's context once, then its reflections
    packed    a sequence per reflection, end to end
    padded    a sequence per reflection, each filled up to the longest

A microbatch holds one group in every layout. The head runs on trained positions in all three, so what is measured is
the layout alone. Tokens per second count each sequence's own tokens, context included, whichever way it is laid.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, machine, results, versions
from benchmarks.plot import picture
from benchmarks.timing import Stopwatch, times_as_long
from benchmarks.workload import Sizes, make_model
from nemo_r3 import runtime
from nemo_r3.config import Config
from nemo_r3.types import Phase, Row, UpdateBatch

PICTURE = ROOT / "docs" / "update_cost.png"
PACKAGES = ("torch", "megatron-core", "transformers")
LAYOUTS = ("shared", "packed", "padded")
GRID_ROUNDS, MAIN_ROUNDS = 2, 3


@dataclass(frozen=True)
class Point:
    """One size of work."""

    context: int  # tokens before a reflection
    reflection: int  # mean tokens of a reflection; lengths are uniform between half and one and a half of it
    group: int  # reflections per context (G)
    groups: int = 1  # contexts per update


BASE = Point(512, 128, 8)
GRID = [
    *(replace(BASE, context=context) for context in (128, 256, 512, 1024, 2048)),
    *(replace(BASE, reflection=reflection) for reflection in (32, 64, 256)),
    *(replace(BASE, group=group) for group in (4, 16)),
    Point(128, 32, 4),
    Point(2048, 32, 4),
    Point(128, 256, 16),
]
GRID_MODEL = Sizes(hidden=256, layers=8, vocabulary=8192)  # about 10M parameters
MAIN = Point(1024, 128, 8, groups=2)
MAIN_MODEL = Sizes()  # about 100M
SMALL_GRID = [Point(64, 16, 4), Point(128, 16, 4), Point(64, 16, 8)]
SMALL_MODEL = Sizes(hidden=64, layers=2, vocabulary=512)


def rows_of(point: Point, vocabulary: int) -> list[Row]:
    """The groups of an update; half of each group's retries pass."""
    draw = random.Random(f"{point}")
    count = point.group * point.groups
    rows = []
    for group in range(point.groups):
        context = [draw.randrange(vocabulary) for _ in range(point.context)]
        for number in range(point.group):
            length = draw.randint(point.reflection // 2, point.reflection * 3 // 2)
            ids = context + [draw.randrange(vocabulary) for _ in range(length)]
            flat = [0.0] * point.context
            rows.append(
                Row(
                    ids=ids,
                    phases=[Phase.TASK] * point.context + [Phase.REFLECTION] * length,
                    sampled=[False] * point.context + [True] * length,
                    advantages=flat + [(-1.0) ** number] * length,
                    loss_weights=flat + [1 / count / length] * length,
                    rollout_logprobs=flat + [-8.0] * length,
                    group=group,
                    shared=point.context,
                )
            )
    return rows


def laid(rows: Sequence[Row], layout: str) -> UpdateBatch:
    """The rows as a layout wants them."""
    if layout == "padded":
        longest = max(map(len, rows))
        rows = [padded(row, longest - len(row)) for row in rows]
    return UpdateBatch(tuple(rows if layout == "shared" else [replace(row, shared=0) for row in rows]), (), 1, 0)


def padded(row: Row, count: int) -> Row:
    """A row with tokens at its end that are computed and thrown away."""
    flat = [0.0] * count
    return replace(
        row,
        ids=[*row.ids, *[0] * count],
        phases=[*row.phases, *[Phase.RETRY] * count],
        sampled=[*row.sampled, *[False] * count],
        advantages=[*row.advantages, *flat],
        loss_weights=[*row.loss_weights, *flat],
        rollout_logprobs=[*row.rollout_logprobs, *flat],
    )


def measure(trainer: Any, point: Point, rounds: int) -> dict[str, Any]:
    """Seconds and memory of an update in each layout, taking turns."""
    policy = trainer.policy
    rows = rows_of(point, policy.arch.vocab_size)
    batches = {layout: laid(rows, layout) for layout in LAYOUTS}
    policy.config.actor.microbatch_tokens = point.group * max(map(len, rows))
    memory = {layout: peak(trainer, laid(rows[: point.group], layout)) for layout in LAYOUTS}
    found: dict[str, dict[str, list[float]]] = {layout: {"seconds": [], "cpu_seconds": []} for layout in LAYOUTS}
    for _ in range(rounds):
        for layout, batch in batches.items():
            watch = Stopwatch()
            with watch.time("update"):
                trainer.update(batch)
            found[layout]["seconds"].append(watch.wall["update"])
            found[layout]["cpu_seconds"].append(watch.cpu["update"])
    tokens = sum(map(len, rows))
    return {
        **asdict(point),
        "sequence_tokens": tokens,
        "tokens_laid": {layout: tokens_of(batch) for layout, batch in batches.items()},
        "layouts": {layout: summary(found[layout], tokens) | {"memory_mb": memory[layout]} for layout in LAYOUTS},
        "ratios": {
            layout: ratio(found, layout) | {"memory": memory[layout] / memory["shared"]} for layout in LAYOUTS[1:]
        },
    }


def peak(trainer: Any, batch: UpdateBatch) -> float:
    """The most memory, in MiB, that an update of one microbatch takes above model and optimizer (Linux).

    Giving free memory back first makes the update slower: it is not one that is timed, and warms up those that are.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    trainer.update(batch)
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """MiB of this process's memory, now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def tokens_of(batch: UpdateBatch) -> int:
    """Tokens that a layout runs through the model."""
    contexts = {row.group: row.shared for row in batch.rows}
    return sum(contexts.values()) + sum(len(row) - 1 - row.shared for row in batch.rows)


def summary(values: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Medians over the turns."""
    medians = {name: statistics.median(of) for name, of in values.items()}
    return medians | {"tokens_per_second": tokens / medians["seconds"]}


def ratio(found: dict[str, dict[str, list[float]]], layout: str) -> dict[str, float]:
    """How many times as much a layout takes as shared contexts do: medians, and the extremes turn by turn."""
    time, low, high = times_as_long(found[layout]["seconds"], found["shared"]["seconds"])
    cpu_time, _, _ = times_as_long(found[layout]["cpu_seconds"], found["shared"]["cpu_seconds"])
    return {"time": time, "time_low": low, "time_high": high, "cpu_time": cpu_time}


def trainer_of(sizes: Sizes, home: Path, world: Any) -> Any:
    """The trainer of a policy with random weights and the paper's settings, in fp32."""
    from nemo_r3.actor.policy import Policy  # after the world has started
    from nemo_r3.actor.trainer import Trainer

    make_model(home, sizes)
    config = Config()
    config.model.path = str(home)
    config.actor.precision = "fp32"
    config.actor.lr = 1e-6
    return Trainer(Policy(config, world))


def main() -> None:
    """Measures the grid and the main point, and writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models and sizes, to see that it runs")
    options = parser.parse_args()
    world = runtime.start(Config())
    grid, main_point = (SMALL_GRID, SMALL_GRID[0]) if options.small else (GRID, MAIN)
    models = (SMALL_MODEL, SMALL_MODEL) if options.small else (GRID_MODEL, MAIN_MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(models[0], Path(scratch) / "grid", world)
        measured = []
        for point in grid:
            measured.append(measure(trainer, point, GRID_ROUNDS))
            print(line(measured[-1]), flush=True)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        found = measure(trainer_of(models[1], Path(scratch) / "main", world), main_point, MAIN_ROUNDS)
    print(line(found), flush=True)
    numbers = {
        **{
            f"shared_vs_{layout}{end}": of[f"time{end}"]
            for end in ("", "_low", "_high")
            for layout, of in found["ratios"].items()
        },
        **{f"memory_{layout}_vs_shared": of["memory"] for layout, of in found["ratios"].items()},
        "main": found,
        "grid": measured,
        "versions": versions(PACKAGES),
        "machine": machine(torch.get_num_threads()),
    }
    out = results("update.json", options.small)
    out.write_text(json.dumps(numbers, indent=1) + "\n")
    base = asdict(grid[0] if options.small else BASE)
    del base["groups"]  # all points have one
    picture(measured, base, out.with_suffix(".png") if options.small else PICTURE)


def line(found: dict[str, Any]) -> str:
    """A point in one line."""
    seconds = "  ".join(
        f"{name} {of['seconds']:.2f} s {of['memory_mb']:.0f} MiB" for name, of in found["layouts"].items()
    )
    times = "  ".join(f"{name}/shared {of['time']:.2f}" for name, of in found["ratios"].items())
    return f"context {found['context']} reflection {found['reflection']} G {found['group']}:  {seconds}  {times}"


if __name__ == "__main__":
    main()
