"""Settings: dataclasses with their defaults and limits, read from YAML and `key=value` arguments.

config = load(["configs/quickstart.yaml", "train.steps=10"])
"""

from nemo_r3.config.actor import ActorConfig
from nemo_r3.config.algo import AlgoConfig
from nemo_r3.config.checks import check, check_world
from nemo_r3.config.cluster import ClusterConfig
from nemo_r3.config.evaluate import EvaluateConfig
from nemo_r3.config.failures import FailuresConfig
from nemo_r3.config.load import load, to_yaml
from nemo_r3.config.model import ModelConfig
from nemo_r3.config.option import option
from nemo_r3.config.resume import diff_for_resume
from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.config.run import RunConfig
from nemo_r3.config.schema import Layer, build
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.config.train import TrainConfig
from nemo_r3.config.tree import Config
from nemo_r3.errors import ConfigError

__all__ = [
    "ActorConfig",
    "AlgoConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DialogueConfig",
    "EvaluateConfig",
    "FailuresConfig",
    "Layer",
    "ModelConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "build",
    "check",
    "check_world",
    "diff_for_resume",
    "load",
    "option",
    "to_yaml",
]
