"""Writes a run's checkpoint as a Hugging Face directory, and checks it against the actor; LoRA's as an adapter, too."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.capacity import export_problem, host_bytes
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.model_card import how_to_use, how_to_use_adapter, model_card
from nemo_r3.models import Architecture, hub_name
from nemo_r3.precision import precision_of
from nemo_r3.progress import warn
from nemo_r3.results import has_results, table
from recipes.metrics import versions
from recipes.setup import join
from recipes.start import start_policy

OUT = "export"
"""In the run directory: where an export goes."""
ADAPTER = "adapter"
"""In the run directory: where what LoRA has trained goes, without the starting weights."""
PROBES = 8
PROBE_TOKENS = 64
"""Only the end of each probe is used: rank 0's CPU runs them, twice, while the other ranks wait."""


def export(argv: Sequence[str]) -> None:
    """`python -m recipes.export CONFIG.yaml key=value ...`: the newest checkpoint to `<run.dir>/export`.

    What LoRA has trained goes to `<run.dir>/adapter`, too.
    """
    setup = join(argv, trains=False)
    from nemo_r3.actor import checkpoint  # megatron-core and transformers: after `join`
    from nemo_r3.adapter import export_adapter, largest_rank
    from nemo_r3.export import export as export_policy
    from nemo_r3.export import refuse_other_contents
    from recipes import checkpoints

    world, run, config, model = setup.world, setup.run, setup.config, setup.model
    if problem := world.broadcast(export_problem(setup.arch, host_bytes())):
        raise ConfigError(problem)
    trained = checkpoints.trained(setup)
    if trained is None:
        raise UserError(f"{run.checkpoints} holds no checkpoint to export: train first, or set evaluate.checkpoint")
    out, adapter = run.path / OUT, run.path / ADAPTER
    world.on_main(partial(refuse_other_contents, out, *([adapter] if config.actor.lora_rank else [])))
    with run.timed("export"):
        policy = start_policy(setup)
        step = checkpoint.load_weights(policy, trained)["step"]
        world.leave_if_asked()
        recorded = run.path / "config.yaml"
        trained_with = configuration.load([str(recorded)]) if recorded.exists() else config
        with_tools = any(problem.tools for problem in setup.task.problems("test"))
        base, summary = base_name(trained_with, model), run.add_to_summary(versions=versions())
        usage = how_to_use(trained_with, setup.dialogue, with_tools)
        card = model_card(trained_with, summary, step, base, usage)
        difference, explained = export_policy(policy, model, out, card, probe_of(run.path, setup.arch))
        if policy.lora is not None:
            start, rank = hub_name(trained_with) or str(model.absolute()), largest_rank(config, setup.arch)
            usage = how_to_use_adapter(trained_with, setup.dialogue, with_tools, start, rank)
            card = model_card(trained_with, summary, step, base, usage, adapter=True)
            export_adapter(policy, model, adapter, start, card)
    summary = run.add_to_summary(export=str(out), export_logprob_difference=difference)
    if world.is_main:
        dtype = precision_of(config).dtype_name
        alone = f", and LoRA alone to {adapter}" if config.actor.lora_rank else ""
        print(
            f"exported step {step} to {out}{alone}; check passed: read by transformers, the export gives a token's "
            f"log-probability within {difference:.1g} of the actor's, where rounding to {dtype} explains up to "
            f"{explained:.1g}"
        )
        if has_results(summary, step):
            print(table(summary))


def base_name(config: Config, model: Path) -> str:
    """What to call the starting model: its name on the hub, or that of its directory, and of an export that of its run.

    `model` is its directory.
    """
    model = model.absolute()
    return hub_name(config) or (model.parent if model.name == OUT else model).name


def probe_of(run: Path, arch: Architecture) -> list[list[int]]:
    """Token ids to compare log-probabilities on: a reflection per problem of the first step, or else random ones."""
    for file in sorted((run / "rollouts").glob("step_*.jsonl"))[:1]:
        try:
            rows: dict[str, dict[str, Any]] = {}
            for row in map(json.loads, file.read_text().splitlines()):  # the context is on a group's first line alone
                rows.setdefault(row["problem_id"], {}).update(row)
            probes = [row["context_ids"] + row["reflection_ids"] for row in rows.values()][:PROBES]
            if not all(0 <= token < arch.vocab_size for ids in probes for token in ids):
                raise ValueError("a token that the model does not have")
            if probes:
                return [ids[-PROBE_TOKENS:] for ids in probes]
        except (ValueError, KeyError, TypeError, RecursionError):
            warn(f"{file} is damaged; the export is compared on random tokens")
    draw = random.Random(0)
    length = min(PROBE_TOKENS, arch.max_positions)
    return [[draw.randrange(arch.vocab_size) for _ in range(length)] for _ in range(PROBES)]


if __name__ == "__main__":
    entry.main(export)
