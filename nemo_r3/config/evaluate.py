"""`evaluate`: what is measured on held-out problems, before and after."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class EvaluateConfig:
    """First try, second try after a failure, and either of them; greedy and sampled."""

    problems: int = option(0, low=0, help="held-out problems to use; 0: all", resume=True)
    checkpoint: str = option("", help="checkpoint to measure; empty: the newest of run.dir", resume=True)
