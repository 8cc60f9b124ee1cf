"""`evaluate`: what is measured on held-out problems, before and after."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class EvaluateConfig:
    """What `recipes.evaluate` measures, and what `recipes.export` writes."""

    problems: int = option(0, low=0, help="held-out problems to use; 0: all", resume=True)
    checkpoint: str = option("", help="checkpoint to measure or export; empty: the newest of run.dir", resume=True)
