"""`Config`: the whole tree, one section per file."""

from dataclasses import dataclass, field

from nemo_r3.config.actor import ActorConfig
from nemo_r3.config.algo import AlgoConfig
from nemo_r3.config.cluster import ClusterConfig
from nemo_r3.config.drill import DrillConfig
from nemo_r3.config.evaluate import EvaluateConfig
from nemo_r3.config.failures import FailuresConfig
from nemo_r3.config.model import ModelConfig
from nemo_r3.config.option import option
from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.config.run import RunConfig
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.config.train import TrainConfig


@dataclass
class Config:
    """Every setting of a run. A YAML file and `key=value` arguments hold only what differs from here."""

    seed: int = option(1, low=0, high=2**32 - 1, help="seeds sampling, problem order and shuffles")
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    drill: DrillConfig = field(default_factory=DrillConfig)
