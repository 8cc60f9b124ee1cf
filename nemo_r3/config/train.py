"""`train`: how long to train, and when to save or give up."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class TrainConfig:
    """One step = a refit if needed, one rollout of `failures_per_step` groups, at most `updates_per_step` updates."""

    steps: int = option(
        1750, low=0, help="training steps (in the paper the most that a run took); TRL's `max_steps`", resume=True
    )
    start_from: str = option(
        "",
        help="checkpoint directory of a run with the same model.path: a new run begins with its weights and AdamW's "
        "moments; settings, steps and learning rate are the new run's own; empty: none",
    )
    failures_per_step: int = option(
        32,
        low=1,
        help="groups per step; times algo.group_size = 256, our reading of the paper's batch; verl's "
        "`train_batch_size`",
    )
    updates_per_step: int = option(
        1,
        low=1,
        help="optimizer steps that share a step's groups; above 1 the loss clips, against the policy that sampled; "
        "1 is the paper's; failures_per_step divided by this is verl's `ppo_mini_batch_size`",
    )
    save_every: int = option(50, low=1, help="steps between checkpoints; the last step is always saved", resume=True)
    save_minutes: float = option(
        0.0,
        low=0.0,
        help="also save after a step that ends this many minutes after the last save began; 0: never. For a job whose "
        "preemption leaves less time than a save takes",
        resume=True,
    )
    keep_checkpoints: int = option(2, low=1, help="how many of the newest checkpoints to keep", resume=True)
    save_in_background: bool = option(
        False,
        help="write a checkpoint while the next steps run, from a copy in host memory; a crash meanwhile goes back to "
        "the one before",
        resume=True,
    )
    max_empty_steps: int = option(
        20, low=1, help="stop after this many steps in a row without a mixed group", resume=True
    )
    max_skipped_steps: int = option(
        5,
        low=1,
        help="stop after this many steps in a row whose updates were all skipped (NaN or Inf gradient, or every token "
        "rejected)",
        resume=True,
    )
    mismatch_warn: float = option(
        1.05, low=1.0, help="warn of a step whose token_mult_prob_error, actor against vLLM, is above this", resume=True
    )
    mismatch_stop: float = option(1.1, low=1.0, help="a step above this counts against max_mismatch_steps", resume=True)
    max_mismatch_steps: int = option(10, low=1, help="stop after this many such steps in a row", resume=True)
    on_mismatch: str = option(
        "stop",
        choices=("stop", "bf16"),
        help="after max_mismatch_steps: stop the run, or switch the quarter of the FP8 layers with the largest FP8 "
        "error to BF16 and restart the count, until none is left",
        resume=True,
    )
    layers_every: int = option(
        100, low=0, help="steps between records of what FP8 costs each layer, in layers.jsonl; 0: none", resume=True
    )
