"""`algo`: the reward's way into the weights (GRPO, arXiv 2402.03300, on reflections only)."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class AlgoConfig:
    """GRPO with the paper's settings."""

    group_size: int = option(8, low=2, help="reflections per failure (G); TRL's `num_generations`, verl's `n`")
    loss: str = option(
        "grpo",
        choices=("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"),
        help="policy loss: a file of nemo_r3.algo.losses, which says how tokens share it and how rewards are centred",
    )
    reward_leaks: bool = option(
        True,
        help="false: a reflection that gives the answer away (its own text passes `verify`) earns nothing, whatever "
        "its retry does",
    )
    advantage: str | None = option(
        None,
        choices=("std", "centred", "leave_one_out"),
        help="what a reward is measured against: the group's mean, and divided by its standard deviation (std) or not "
        "(centred), or the others' mean; default: as the loss does; TRL's `scale_rewards` is std",
    )
    mask_truncated: bool = option(
        False,
        help="leave out reflections cut at their token limit (with `algo.trained_phases`: if a trained turn is); "
        "their rewards still count in their groups' mean",
    )
    kl_beta: float = option(
        0.001,
        low=0.0,
        help="weight of the KL to the starting model; 0: no reference is kept; TRL's `beta`, verl's `kl_loss_coef`",
    )
    kl_estimator: str = option(
        "k3",
        choices=("k2", "k3"),
        help="estimator of that KL (http://joschu.net/blog/kl-approx.html); k3's gradient is that of "
        "KL(start || policy), as in GRPO and TRL, k2's that of KL(policy || start)",
    )
    mismatch_correction: str = option(
        "none",
        choices=("none", "tis", "icepop", "sequence_mask"),
        help="importance correction for the gap between vLLM and the actor; the last two reject what is far off",
    )
    mismatch_low: float | None = option(
        None, above=0.0, high=1.0, help="reject probability ratios below this; default: the correction's own"
    )
    mismatch_high: float | None = option(
        None, above=1.0, help="truncate (tis) or reject ratios above this; default: the correction's own"
    )
    trained_phases: list[str] = option(
        factory=lambda: ["reflection"],
        choices=("reflection", "retry"),
        help="phases whose sampled tokens carry loss; not the attempt: a group shares it, so its advantages sum to 0",
    )
    keep_equal_groups: bool = option(
        False,
        help="keep groups whose rewards are all equal, with advantage 0: they count in the loss's denominators and in "
        "its KL, as in TRL",
    )
    shuffle_rewards: bool = option(
        False, help="control: deal each group's rewards to its reflections at random, so that they teach nothing"
    )
