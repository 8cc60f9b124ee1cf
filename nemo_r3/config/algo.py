"""`algo`: the reward's way into the weights (GRPO, arXiv 2402.03300, on reflections only)."""

from dataclasses import dataclass

from nemo_r3.config.option import option

PHASES = ("attempt", "reflection", "retry")


@dataclass
class AlgoConfig:
    """GRPO with the paper's settings."""

    group_size: int = option(8, low=2, help="reflections per failure (G)")
    loss: str = option("grpo", choices=("grpo",), help="policy loss: a file of nemo_r3.algo.losses")
    clip_low: float = option(
        0.2, above=0.0, high=1.0, help="PPO clip below 1; no effect while a rollout gets one update"
    )
    clip_high: float = option(0.2, above=0.0, help="PPO clip above 1; no effect while a rollout gets one update")
    advantage_std: bool = option(True, help="divide the group's centred rewards by their standard deviation")
    kl_beta: float = option(0.001, low=0.0, help="weight of the KL to the starting model; 0: no reference is kept")
    kl_estimator: str = option(
        "k3", choices=("k1", "k2", "k3"), help="estimator of that KL (http://joschu.net/blog/kl-approx.html)"
    )
    mismatch_correction: str = option(
        "none", choices=("none", "tis"), help="importance correction for the gap between vLLM and the actor"
    )
    mismatch_cap: float = option(2.0, above=1.0, help="tis: truncate the ratio here")
    trained_phases: list[str] = option(
        factory=lambda: ["reflection"], choices=PHASES, help="phases whose sampled tokens carry loss"
    )
    shuffle_rewards: bool = option(False, help="control: deal the step's rewards at random, so that they teach nothing")
