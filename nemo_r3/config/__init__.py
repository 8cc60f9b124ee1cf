"""Settings: dataclasses with their defaults and limits, read from YAML and `key=value` arguments.

config = load(["configs/quickstart.yaml", "train.steps=10"])
"""

from nemo_r3.config.actor import ActorConfig
from nemo_r3.config.algo import AlgoConfig
from nemo_r3.config.checks import check_world, fewest_ranks
from nemo_r3.config.load import load, to_yaml
from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.config.train import TrainConfig
from nemo_r3.config.tree import Config, diff_for_resume, shareable

__all__ = [
    "ActorConfig",
    "AlgoConfig",
    "Config",
    "RolloutConfig",
    "TrainConfig",
    "check_world",
    "diff_for_resume",
    "fewest_ranks",
    "load",
    "shareable",
    "to_yaml",
]
